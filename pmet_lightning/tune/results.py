"""The files of a search: the configuration, its records, all that was measured, and the page."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmet_lightning.evaluation.scores import score_difference
from pmet_lightning.report.tables import score_cell
from pmet_lightning.tune.facts import Item
from pmet_lightning.tune.tuned import UNTUNED, Tuned
from pmet_lightning.utils.files import atomic_path, write_json

CONFIG, PAGE, TABLE, RESULT = "tuned.yaml", "tuned.html", "trials.tsv", "tuned.json"
TUNING, REPORTING = "tuning.json", "reporting.json"
_DIFFERENCE = ("difference", "difference_low", "difference_high")
_COMMENTS = {
    "layers": "edited layers",
    "optimize": "where deltas are added: attn+ffn (PMET), ffn, hidden (MEMIT)",
    "steps": "maximum number of iterations for one edit (not searched)",
    "clamp": "maximum norm of a delta, in norms of the clean output it is added to",
    "kl_factor": 'weight of the divergence at "{subject} is a"',
    "norm_factor": "weight of the norm term",
    "keep_float32": "hold the edited projections in float32, so that no edit is lost to rounding",
    "seed": "seed of the sampled contexts",
    "dtype": "precision the model is loaded in",
    "lam": "weight of the second moments, in preserved keys",
    "rule": "share of the residual that a layer takes: sqrt (PMET) or even (MEMIT)",
    "stop_at_argmax": "whether a search also ends where every token is the likeliest",
    "targets": "spread: found in the last layer, for all; replay, successive: in the first, one for each layer",
    "corpus": "text for the second moments, as in the search: those that it stored are found again",
    "text": "text on which the effect of the edits is measured",
}


def write_results(tuned: Tuned, folder: Path) -> None:
    """Write all files.

    Args:
        tuned: The result.
        folder: Their folder.
    """
    from pmet_lightning.tune.page import write_tuning_page  # seconds of imports

    write_records(tuned.facts.tuning, folder / TUNING)
    write_records(tuned.facts.reporting, folder / REPORTING)
    write_table(tuned.rows, folder / TABLE)
    write_json(folder / RESULT, plain_result(tuned))
    with atomic_path(folder / CONFIG) as temporary:
        temporary.write_text("\n".join(config_lines(tuned, folder)) + "\n", encoding="utf-8")
    write_tuning_page(tuned, folder / PAGE)


def write_records(items: Sequence[Item], path: Path) -> None:
    """Write records as they are stored; those that were given as objects have no file."""
    if all(isinstance(item.record, Mapping) for item in items):
        write_json(path, [item.record for item in items])


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write all that was measured, a setting in a line, columns separated by tabs."""
    flat = [{**row, "layers": _range(row["layers"]), "seconds": sum(row["seconds"].values())} for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    lines = ["\t".join(columns), *("\t".join(_cell(row.get(name)) for name in columns) for row in flat)]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def plain_result(tuned: Tuned) -> dict[str, Any]:
    """The result as JSON has it."""
    finalists = [
        {**one.setting.plain(), "scores": dict(one.outcome.scores), "growth": one.outcome.growth}
        for one in tuned.finalists
    ]
    return {
        "model": tuned.model,
        "settings": tuned.sections,
        "edits": tuned.edits,
        "facts": tuned.facts.source,
        "tuning": dict(tuned.tuning.scores),
        "before": dict(tuned.reporting.before),
        "reporting": dict(tuned.reporting.scores),
        "untuned": dict(tuned.untuned.scores),
        "notices": list(tuned.notices),
        "finalists": finalists,
        "equal": tuned.equal,
        "trials": dict(tuned.trials),
        "seconds": round(tuned.seconds),
        "seed": tuned.seed,
    }


def config_lines(tuned: Tuned, folder: Path) -> list[str]:
    """The configuration, commented: what was chosen, from what, and how sure that is."""
    sections = tuned.sections
    adam = sections["model"]["optimizer"]["init_args"]["lr"]
    records = folder / REPORTING if (folder / REPORTING).is_file() else "facts.json"
    model = {name: value for name, value in sections["model"].items() if name != "optimizer"}
    lines = [
        *(f"# {line}" for line in summary_lines(tuned)),
        "",
        f"seed_everything: {tuned.seed}",
        "",
        "trainer:                       # Lightning's Trainer (fit --help=trainer lists its arguments)",
        "  run_dir: null                # folder of the run; null uses the next free runs/run_N",
        "  accelerator: auto            # cpu, gpu, auto",
        "  devices: 1                   # processes",
        "",
        "model:                         # step 1: target vectors",
        _line("model_name", tuned.model, "a folder of save_pretrained, a GGUF file or a hub name"),
        *(_line(name, value, _COMMENTS.get(name, "")) for name, value in model.items()),
        "  optimizer:                   # each edit has its own parameters",
        "    class_path: torch.optim.Adam",
        "    init_args:",
        f"      lr: {adam:g}".ljust(31) + "# step size, in units of the residual stream",
        "",
        "data:                          # the edits",
        _line("path", str(records), "your facts; these are the records of the figure above"),
        _line("limit", tuned.edits, "maximum number of records; null uses all"),
        "  edit_batch: null             # edits written by one solve; null uses all",
    ]
    for name, title in _SECTIONS.items():
        given = {key: value for key, value in sections[name].items() if value is not None}
        lines += ["", f"{name}:".ljust(31) + f"# {title}"]
        lines += [_line(key, value, _COMMENTS.get(key, "")) for key, value in given.items()]
    return lines


_SECTIONS = {
    "moments": "second moments of keys over general text",
    "spread": "steps 2 and 3: keys and the closed-form update",
    "drift": "effect of the edits on unrelated text",
}


def summary_lines(tuned: Tuned) -> list[str]:
    """What was chosen, from what, and how sure it is, in words."""
    after, before = tuned.reporting.scores, tuned.reporting.before
    lines = [
        f"Settings for {tuned.model}, found by 'pmet-lightning tune' (seed {tuned.seed}):",
        f"{len(tuned.rows)} measured in {tuned.seconds / 60:.0f} minutes on {len(tuned.facts.tuning)} records; "
        f"{_equal(tuned)}",
        f"Facts: {tuned.facts.source}.",
        f"On {int(after['count'])} records of other subjects, in one edit batch, which nothing was chosen on:",
        f"  {_scores(after, tuned.reporting.score)}" + (f"; unedited: {_scores(before, None)}" if before else ""),
        f"  {_damage(before, after)}",
        f"With {UNTUNED} and layers auto instead: {_scores(tuned.untuned.scores, tuned.untuned.score)}{_gain(tuned)}.",
        f"(On the tuning records: {_scores(tuned.tuning.scores, tuned.tuning.score)}; they were chosen on these, so "
        "that it is as a rule too good.)",
    ]
    return [*lines, *(f"NOTICE: {notice}." for notice in tuned.notices)]


def _gain(tuned: Tuned) -> str:
    """How much the Score rises by the search, where all of it was asked."""
    found = score_difference(tuned.reporting.rows, tuned.untuned.rows)
    value, low, high = (float(found.get(name, math.nan)) for name in _DIFFERENCE)
    return "" if math.isnan(value) else f"; the search adds {value:.1f} [{low:.1f}, {high:.1f}]"


def _equal(tuned: Tuned) -> str:
    if tuned.equal == 1:
        count = len(tuned.finalists)
        return f"the best of {count} finalists." if count > 1 else "the only finalist."
    return f"the gentlest of {tuned.equal} (of {len(tuned.finalists)}) finalists that chance does not tell apart."


def _scores(table: Mapping[str, float], score: float | None) -> str:
    names = [name for name in ("score", "efficacy", "generalisation", "specificity") if name in table]
    words = {"score": "Score", "generalisation": "generalization"}
    if score is not None and "score" not in table:
        return f"Score of what was asked {score:.1f}, " + _scores(table, None)
    return ", ".join(f"{words.get(name, name)} {score_cell(table, name)}" for name in names)


def _damage(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    parts = []
    if "efficacy_contains" in after:
        parts.append(f"{after['efficacy_contains']:.0f} % of the new facts are in generated answers")
    if "specificity_kl" in after:
        parts.append(f"KL on neighbors {after['specificity_kl']:.2f}")
    if "perplexity" in after and before.get("perplexity"):
        parts.append(f"perplexity × {after['perplexity'] / before['perplexity']:.2f}")
    return ", ".join(parts)


def closing_lines(tuned: Tuned, folder: Path) -> Iterator[str]:
    """What is shown at the end; the last line is the command to run next."""
    yield from summary_lines(tuned)
    yield f"the settings: {folder / CONFIG}; the page with all that was tried: {folder / PAGE}"
    config = shlex.quote(str(folder / CONFIG))
    yield f"next: pmet-lightning fit --config {config} --data.path facts.json --data.limit null --trainer.run_dir run"


def _line(name: str, value: Any, comment: str) -> str:
    text = f"  {name}: {_yaml(value)}"
    return f"{text.ljust(30)} # {comment}" if comment else text


def _yaml(value: Any) -> str:
    """A value in YAML's flow style, which JSON is a part of; a number as it is."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _range(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)

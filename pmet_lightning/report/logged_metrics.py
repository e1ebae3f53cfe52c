"""What a run logs, as plain numbers and texts: pure functions of the results of an edit batch.

Legend: B = edits, S = steps, P = parts of the loss and P(o*), L = quantiles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from pmet_lightning.evaluation.scores import METRICS
from pmet_lightning.report.tables import score_cell
from pmet_lightning.targets.loop import Rules
from pmet_lightning.targets.store import PARTS, STOP_REASONS, Target, mean_curves, pad_histories, stack_values
from pmet_lightning.utils.metric_names import (
    ACTIVE,
    EDIT_BATCHES,
    HISTOGRAMS,
    LAYERS,
    NUMERICS,
    QUANTILES,
    SCORES,
    STEPS,
    WRITES,
)
from pmet_lightning.write.write_report import LayerReport, WriteReport

LEVELS = {"q10": 0.1, "q50": 0.5, "q90": 0.9}
CLAMP_TOLERANCE = 1e-4  # relative: a delta this close to its clamp touches it
# Fields of a LayerReport: what a write did, and how accurately it was solved and stored.
_DONE = ("residual_after", "overshoot", "norm_ratio", "growth")
_NUMERICS = ("lam", "solve_error", "condition_bound", "ridge", "kept", "changed", "rounding")
_MAX_VECTORS = 256  # of an edit batch, in a histogram
_MAX_TEXTS = 8  # of an edit batch
_COLUMNS = ("question", "was", "target", "says before", "says after")


def step_points(targets: Sequence[Target], rules: Rules) -> Iterator[dict[str, float]]:
    """At each step of an edit batch: means and quantiles over all its edits, stopped ones with their last values.

    Means over the edits that took the step are there too, and the share of edits that are finished after it. Parts of
    the loss without a weight are left out, and a part that is all of the loss.

    Args:
        targets: Targets of the edit batch.
        rules: The weights of the parts.
    """
    weights = {"loss_nll": rules.nll, "loss_kl": rules.kl, "loss_norm": rules.norm}
    weighted = [part for part, weight in weights.items() if weight]
    # A single part with the weight 1 is the loss itself, and its curve would be there twice.
    twice = weighted if [weights[part] for part in weighted] == [1] else []
    names = [part for part in PARTS if weights.get(part, 1) and part not in twice]
    columns = [PARTS.index(name) for name in names]
    histories_BSP = pad_histories(targets)[..., columns]
    levels_L = histories_BSP.new_tensor(list(LEVELS.values()))
    for step, active in enumerate(mean_curves(targets)):
        values_BP = histories_BSP[:, step]
        values = dict(zip((f"{STEPS}/{name}" for name in names), values_BP.mean(dim=0).tolist(), strict=True))
        for level, row_P in zip(LEVELS, values_BP.quantile(levels_L, dim=0), strict=True):
            named = (f"{QUANTILES}/{name}_{level}" for name in names)
            values |= dict(zip(named, row_P.tolist(), strict=True))
        values |= {f"{ACTIVE}/{name}": active[name] for name in (*names, "active_edits")}
        finished = sum(len(target.history_SP) <= step + 1 for target in targets)
        yield values | {f"{STEPS}/finished": finished / len(targets)}


def batch_points(report: WriteReport, clamp: float) -> dict[str, float]:
    """Results of the target optimization of an edit batch, and the residual left after its write.

    Args:
        report: Report of the edit batch.
        clamp: Maximum norm of a delta, in norms of the clean output.
    """
    records, count = [target.record for target in report.targets], len(report.targets)
    reasons = Counter(record["stop_reason"] for record in records)
    values = {f"stopped_by_{reason}": reasons[reason] / count for reason in STOP_REASONS}
    for name in ("steps", "p_before", "p_after", *_deltas(report)):
        values[name] = sum(record[name] for record in records) / count
    for name in _deltas(report):
        touching = sum(record[name] >= clamp * (1 - CLAMP_TOLERANCE) for record in records)
        values[f"clamped_{name.removeprefix('delta_')}"] = touching / count
    values["residual_left"] = report.layers[-1].residual_after
    return {f"{EDIT_BATCHES}/{name}": value for name, value in values.items()}


def layer_points(layer: LayerReport) -> dict[str, float]:
    """A write under the tags of its layer: what it did, and how accurately it was solved and stored."""
    where, figures = f"{layer.site}_layer_{layer.layer}", asdict(layer)
    groups = {LAYERS: _DONE, NUMERICS: _NUMERICS}
    return {f"{group}/{name}/{where}": figures[name] for group, names in groups.items() for name in names}


def write_points(report: WriteReport) -> Iterator[tuple[int, dict[str, float]]]:
    """What each layer's write did, with steps that count writes from the first edit batch on."""
    layers = sorted({layer.layer for layer in report.layers})
    for step, number in enumerate(layers, start=report.edit_batch * len(layers)):
        writes = [layer for layer in report.layers if layer.layer == number]
        yield step, {f"{WRITES}/{name}_{layer.site}": getattr(layer, name) for layer in writes for name in _DONE}


def histograms(report: WriteReport) -> dict[str, Tensor]:
    """Entries of the target vectors of some edits, and figures with one number for each edit."""
    some = report.targets[:_MAX_VECTORS]
    last = {site: (site, layer) for site, layer in sorted(some[0].values, key=lambda place: place[1])}
    found = {f"target_{site}": stack_values(some, place).float() for site, place in last.items()}
    for name in ("steps", "p_after", *_deltas(report)):
        found[name] = torch.tensor([float(target.record[name]) for target in report.targets])
    found["residual_left"] = torch.tensor(report.residual_left)
    return {f"{HISTOGRAMS}/{name}": values for name, values in found.items()}


def shown_edits(count: int) -> range:
    """Indices of the edits of an edit batch that are shown as text."""
    return range(min(count, _MAX_TEXTS))


def answers_table(questions: Sequence[str], before: Sequence[str], ledger: Sequence[Mapping[str, Any]]) -> str:
    """The model's answers to the questions of some edits before and after their edit batch, in Markdown.

    Args:
        questions: Questions of these edits.
        before: Answers before the edit batch.
        ledger: Ledger lines of these edits.
    """
    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for question, answer_before, line in zip(questions, before, ledger, strict=True):
        rows.append((question, line["target_true"] or "", line["target"], answer_before, line["answer"]))
    return _markdown(rows)


def scores_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """The scores of each phase with their intervals, in Markdown."""
    rows = [("", *METRICS), ("---",) * (1 + len(METRICS))]
    rows += [(phase, *(score_cell(table, name) for name in METRICS)) for phase, table in results.items()]
    return _markdown(rows)


def is_shown(edit_batch: int) -> bool:
    """Whether curves, histograms and texts of an edit batch are logged: 0 to 9, 10, 20 to 90, 100, 200 and so on.

    A stream of thousands of edit batches would otherwise log gigabytes.
    """
    return edit_batch % 10 ** (len(str(edit_batch)) - 1) == 0


def layout() -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Charts of TensorBoard's custom scalars: quantiles as bands, all layers in one chart."""

    def band(part: str) -> tuple[str, list[str]]:
        return "Margin", [f"{QUANTILES}/{part}_{level}" for level in ("q50", "q10", "q90")]

    return {
        "scores": {"scores": ("Multiline", [f"{SCORES}/{name}" for name in METRICS])},
        "targets by step: median, 10 % and 90 % of the edits": {part: band(part) for part in ("loss", "p", "p_prompt")},
        "edit batches": {
            "why the search stopped": ("Multiline", [f"{EDIT_BATCHES}/stopped_by_.*"]),
            "length of the deltas, in norms of the clean output": ("Multiline", [f"{EDIT_BATCHES}/delta_.*"]),
        },
        "writes, all layers together": {name: ("Multiline", [f"{LAYERS}/{name}/.*"]) for name in _DONE},
    }


def _deltas(report: WriteReport) -> list[str]:
    sites = dict.fromkeys(site for site, _ in report.targets[0].values)
    return [name for site in sites if (name := f"delta_{site}") in report.targets[0].record]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

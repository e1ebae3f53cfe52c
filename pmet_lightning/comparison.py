"""The verb ``compare``: several methods on the same records, with the same seed and contexts; one table, one plot."""

from __future__ import annotations

import csv
import json
import logging
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from pmet_lightning.files import atomic_path, write_json
from pmet_lightning.metrics import METRICS
from pmet_lightning.metrics.scores import NAMES, score_difference, table_of
from pmet_lightning.page import STYLE, panels, svg, write_page
from pmet_lightning.recorder import score_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

RESULT, PAGE = "comparison.json", "comparison.html"
UNEDITED = "unedited"


@dataclass(frozen=True)
class Method:
    """One way to edit.

    Attributes:
        config: Configuration of its runs, a file or the name of a shipped one.
        options: What differs from it: dotted names and values, as on the command line.
        verb: fit, or finetune for the baseline.
    """

    config: str = "pmet.yaml"
    options: dict[str, Any] = field(default_factory=dict)
    verb: Literal["fit", "finetune"] = "fit"


@dataclass(frozen=True)
class Run:
    """One run of a comparison: ``edits`` records from ``skip`` on, in the order of ``seed``."""

    method: str
    edits: int
    seed: int
    skip: int

    @property
    def name(self) -> str:
        """Its folder."""
        words = "".join(c if c.isalnum() else "-" for c in self.method)
        return f"{words}-{self.edits}-seed{self.seed}-from{self.skip}"


def compare(
    methods: dict[str, Method],
    out: str,
    edits: list[PositiveInt],  # type: ignore[valid-type]
    seeds: list[NonNegativeInt],  # type: ignore[valid-type]
    least: PositiveInt = 10,  # type: ignore[valid-type]
    options: dict[str, Any] | None = None,
) -> None:
    """Run several methods on the same records: one table and one plot of the Score against the number of edits.

    A comparison that was stopped goes on where it was: runs that are finished in the folder are not run again.

    Args:
        methods: Name and settings of each method.
        out: Folder of the runs, of comparison.json, comparison.csv and comparison.html.
        edits: Numbers of edits, each written in one edit batch.
        seeds: Each shuffles the records and samples contexts of its own.
        least: With fewer edits than this, a seed is repeated on further records until so many were judged.
        options: Options that all runs share, such as data.path.

    Raises:
        ValueError: If there is nothing to compare, or a folder holds runs with other settings.
    """
    if not (methods and edits and seeds):
        raise ValueError("--methods, --edits and --seeds: expected at least one of each")
    folder = Path(out).expanduser()
    runs = list(_planned(methods, edits, seeds, least))
    for number, run in enumerate(runs, start=1):
        log.info("run %d of %d: %s, %d edits, seed %d", number, len(runs), run.method, run.edits, run.seed)
        _run(run, methods[run.method], options or {}, folder)
    results = _collect(runs, folder)
    write_json(folder / RESULT, {"results": results, "methods": {name: vars(m) for name, m in methods.items()}})
    _write_csv(results, folder / "comparison.csv")
    values = {"results": results, "plot": svg(score_plot(results), "scores"), "methods": methods}
    page = write_page("comparison.html.jinja", values, folder / PAGE)
    log.info("%s\n%s", "\n".join(table_lines(results)), page)


def _planned(methods: Mapping[str, Method], edits: Sequence[int], seeds: Sequence[int], least: int) -> Iterator[Run]:
    """All runs; methods side by side, so that a stopped comparison has something of each."""
    for count in edits:
        for seed in seeds:
            for part in range(max(1, -(-least // count))):
                for method in methods:
                    yield Run(method, count, seed, part * count)


def _run(run: Run, method: Method, common: Mapping[str, Any], folder: Path) -> None:
    """Run it unless its folder says that it is finished; what a run left unfinished is removed."""
    place = folder / run.name
    settings = {
        **common,
        **method.options,
        "data.limit": run.edits,
        "data.skip": run.skip,
        "data.shuffle": run.seed,
        "model.seed": run.seed,
    }
    if method.verb == "fit":
        settings.setdefault("model.targets_folder", str(folder / "targets"))
    wanted = {"verb": method.verb, "config": method.config, "settings": settings}
    if _finished(place):
        if json.loads((place / "run.json").read_text(encoding="utf-8")) != wanted:
            raise ValueError(f"{place} holds a run with other settings; set --out to another folder, or remove it")
        return
    if place.exists():
        shutil.rmtree(place)
    found = len(quiet_run(method, settings, place)["edits"])
    if found < run.edits:
        raise ValueError(
            f"{run.edits} edits were asked for from record {run.skip} on, and the data has {found}; give more records "
            "(data.path may be a list), or set smaller --edits"
        )
    write_json(place / "run.json", wanted)


def quiet_run(method: Method, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run a method without loggers and progress bars.

    Args:
        method: The method; its own options are not looked at.
        options: What differs from its configuration.
        folder: The run folder.

    Returns:
        What the run's report.json holds.
    """
    from pmet_lightning.cli import edit_cli  # the command line knows this module

    quiet = {"trainer.run_dir": str(folder), "trainer.logger": False, "trainer.enable_progress_bar": False}
    edit_cli([method.verb, "--config", method.config, *options_of({**options, **quiet})])
    return _report_of(folder)


def _report_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))


def options_of(settings: Mapping[str, Any]) -> list[str]:
    """Dotted names and values as arguments of the command line."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return [part for name, text in texts.items() for part in (f"--{name}", text)]


def _finished(place: Path) -> bool:
    return (place / "run.json").is_file() and (place / "report.json").is_file()


def _collect(runs: Sequence[Run], folder: Path) -> list[dict[str, Any]]:
    """For each method and number of edits the table over the records of all its runs; the unedited model first."""
    groups: dict[tuple[int, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.edits, run.method].append(run)
    results: list[dict[str, Any]] = []
    first: dict[int, Tensor] = {}
    for (count, method), group in groups.items():
        reports = [_report_of(folder / run.name) for run in group]
        rows = _rows(reports, "after")
        if count not in first:
            first[count] = rows
            results.append(_result(UNEDITED, count, group, reports, _rows(reports, "before")))
        row = _result(method, count, group, reports, rows)
        row["seconds"] = sum(report["seconds"] for report in reports) / len(reports)
        row |= _floats(score_difference(rows, first[count]))
        results.append(row)
    return results


def _rows(reports: Sequence[Mapping[str, Any]], phase: str) -> Tensor:
    """Rows of the records of some runs, one after the other."""
    tables = [edit[phase] for report in reports for edit in report["edits"]]
    values = [[float(i), *(row.get(name, math.nan) / 100 for name in NAMES)] for i, row in enumerate(tables)]
    return torch.tensor(values, dtype=torch.float64)


def _result(
    method: str, count: int, runs: Sequence[Run], reports: Sequence[Mapping[str, Any]], rows: Tensor
) -> dict[str, Any]:
    seeds = [run.seed for run, report in zip(runs, reports, strict=True) for _ in report["edits"]]
    parts = {seed: rows[torch.tensor([s == seed for s in seeds])] for seed in sorted(set(seeds))}
    by_seed = {seed: _floats(table_of(part)).get("score") for seed, part in parts.items()}
    return {"method": method, "edits": count, "runs": len(runs), **_floats(table_of(rows)), "score_by_seed": by_seed}


def _floats(table: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in table.items()}


def table_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The results as a Markdown table."""
    head = ["edits", "method", *METRICS, "to the first", "records", "Score by seed", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in results:
        seeds = ", ".join("-" if score is None else f"{score:.1f}" for score in row["score_by_seed"].values())
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        cells = [str(row["edits"]), row["method"], *(score_cell(row, name) for name in (*METRICS, "difference"))]
        lines.append("| " + " | ".join([*cells, f"{row['count']:.0f}", seeds, seconds]) + " |")
    return lines


def score_plot(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Score against the number of edits, a line with 95 % intervals for each method."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure, (axes,) = panels(9.4, 4.6, 1, 1)
        _draw_scores(axes, results)
    return figure


def _draw_scores(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    for method in dict.fromkeys(row["method"] for row in results if row["method"] != UNEDITED):
        points = [row for row in results if row["method"] == method and "score" in row]
        scores = [row["score"] for row in points]
        errors = [
            [max(0.0, row["score"] - row["score_low"]) for row in points],
            [max(0.0, row["score_high"] - row["score"]) for row in points],
        ]
        axes.errorbar([row["edits"] for row in points], scores, yerr=errors, marker="o", capsize=3, label=method)
    axes.set(xscale="log", xlabel="edits in one batch", ylabel="Score", ylim=(0, 102))
    counts = sorted({row["edits"] for row in results})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.legend(loc="lower left", ncols=2)


def _write_csv(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in results for name in row if name != "score_by_seed"))
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results)

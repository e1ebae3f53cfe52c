"""The results of a comparison: its table, its plot, and their files."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pmet_lightning.compare.plan import Method, Run, read_report
from pmet_lightning.evaluation.scores import METRICS, NAMES, SCALES, score_difference, table_of
from pmet_lightning.report.html import STYLE, panels, svg, write_page
from pmet_lightning.report.tables import score_cell
from pmet_lightning.utils.files import write_csv, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


log = logging.getLogger(__name__)

RESULT, PAGE = "comparison.json", "comparison.html"
UNEDITED = "unedited"


def write_results(methods: Mapping[str, Method], runs: Sequence[Run], folder: Path) -> None:
    """Write comparison.json, comparison.csv and comparison.html, and log the table.

    Args:
        methods: The methods by name.
        runs: Their finished runs.
        folder: Folder of the run folders, to which the files are written.
    """
    results = _collect(runs, folder)
    write_json(folder / RESULT, {"results": results, "methods": {name: vars(m) for name, m in methods.items()}})
    rows = [{name: value for name, value in row.items() if name != "score_by_seed"} for row in results]
    write_csv(folder / "comparison.csv", list(dict.fromkeys(name for row in rows for name in row)), rows)
    values = {"results": results, "plot": svg(score_plot(results), "scores"), "methods": methods}
    page = write_page("comparison.html.jinja", values, folder / PAGE)
    log.info("%s\n%s", "\n".join(table_lines(results)), page)


def _collect(runs: Sequence[Run], folder: Path) -> list[dict[str, Any]]:
    """The scores of each number of edits and method over the records of all runs; the unedited model comes first."""
    groups: dict[tuple[int, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.edits, run.method].append(run)
    results: list[dict[str, Any]] = []
    reference_rows: dict[int, Tensor] = {}  # of the first method, by number of edits
    for (count, method), group in groups.items():
        reports = [read_report(folder / run.name) for run in group]
        rows = edit_rows(reports, "after")
        if count not in reference_rows:
            reference_rows[count] = rows
            results.append(_result(UNEDITED, count, group, reports, edit_rows(reports, "before")))
        row = _result(method, count, group, reports, rows)
        row["seconds"] = sum(report["seconds"] for report in reports) / len(reports)
        row |= _floats(score_difference(rows, reference_rows[count]))
        results.append(row)
    return results


def edit_rows(reports: Sequence[Mapping[str, Any]], phase: str) -> Tensor:
    """The score rows of all records of some runs, shape [records, 1 + NAMES]: index and fractions, NaN if not asked."""
    tables = [edit[phase] for report in reports for edit in report["edits"]]
    values = [[row.get(name, math.nan) for name in NAMES] for row in tables]
    rows = torch.tensor(values, dtype=torch.float64).reshape(len(tables), len(NAMES)) / SCALES
    return torch.cat([torch.arange(len(tables), dtype=torch.float64).unsqueeze(1), rows], dim=1)


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
    head = ["edits", "method", *METRICS, "vs. first", "records", "Score by seed", "seconds"]
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
            [max(0.0, row["score"] - row.get("score_low", row["score"])) for row in points],
            [max(0.0, row.get("score_high", row["score"]) - row["score"]) for row in points],
        ]
        axes.errorbar([row["edits"] for row in points], scores, yerr=errors, marker="o", capsize=3, label=method)
    axes.set(xscale="log", xlabel="edits in one batch", ylabel="Score", ylim=(0, 102))
    counts = sorted({row["edits"] for row in results})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.legend(loc="lower left", ncols=2)

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

from pmet_lightning.compare.layers import layer_means, layer_plot
from pmet_lightning.compare.plan import Method, Run, read_report
from pmet_lightning.evaluation.scores import METRICS, NAMES, SCALES, score_difference, table_of
from pmet_lightning.report.html import GREEN, INK, MUTED, ORANGE, STYLE, panels, svg, write_page
from pmet_lightning.report.tables import score_cell
from pmet_lightning.utils.files import atomic_path, write_csv, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


log = logging.getLogger(__name__)

RESULT, PAGE = "comparison.json", "comparison.html"
UNEDITED = "unedited"
_NESTED = ("score_by_seed", "layers")  # not in a table
_IDENTITY = ("case_id", "question", "target")
FAR = 20.0  # points below the highest Score: methods that far away are drawn on the edge


def write_results(methods: Mapping[str, Method], runs: Sequence[Run], folder: Path) -> None:
    """Write comparison.json, .csv, .md and .html, and log the table.

    Args:
        methods: The methods by name.
        runs: Their finished runs.
        folder: Folder of the run folders, to which the files are written.
    """
    results = _collect(runs, folder)
    write_json(folder / RESULT, {"results": results, "methods": {name: vars(m) for name, m in methods.items()}})
    rows = [{name: value for name, value in row.items() if name not in _NESTED} for row in results]
    write_csv(folder / "comparison.csv", list(dict.fromkeys(name for row in rows for name in row)), rows)
    with atomic_path(folder / "comparison.md") as temporary:
        temporary.write_text("\n".join(markdown_lines(results)) + "\n", encoding="utf-8")
    values = {
        "results": results,
        "plots": {
            count: svg(score_plot(own, limits_of(results)), f"scores{count}") for count, own in by_count(results)
        },
        "layers": {
            count: svg(figure, f"layers{count}")
            for count, own in by_count(results)
            if (figure := layer_plot(own)) is not None
        },
        "findings": {count: finding(own) for count, own in by_count(results)},
        "counted": {count: counted(own[0]) for count, own in by_count(results)},
        "methods": methods,
    }
    page = write_page("comparison.html.jinja", values, folder / PAGE)
    log.info("%s\nthe page with the plots: %s", "\n".join(table_lines(results)), page)


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
        row["seconds"] = sum(map(_own_seconds, reports)) / len(reports)
        row["layers"] = layer_means(reports)
        row |= _floats(score_difference(rows, reference_rows[count]))
        results.append(row)
    return results


def _own_seconds(report: Mapping[str, Any]) -> float:
    """How long a run took, without the questions to the unedited model: only the first of several runs asks them."""
    return float(report["seconds"]) - float(report.get("phases", {}).get("before", 0))


def edit_rows(reports: Sequence[Mapping[str, Any]], phase: str) -> Tensor:
    """The score rows of all records of some runs, shape [rows, 1 + NAMES]: number and fractions, NaN if not asked.

    A record that several runs have, as seeds that shuffle one file do, has one number.
    """
    edits = [edit for report in reports for edit in report["edits"]]
    numbers: dict[tuple[Any, ...], int] = {}
    ids = [numbers.setdefault(tuple(edit[name] for name in _IDENTITY), len(numbers)) for edit in edits]
    values = [[edit[phase].get(name, math.nan) for name in NAMES] for edit in edits]
    rows = torch.tensor(values, dtype=torch.float64).reshape(len(edits), len(NAMES)) / SCALES
    return torch.cat([torch.tensor(ids, dtype=torch.float64).unsqueeze(1), rows], dim=1)


def _result(
    method: str, count: int, runs: Sequence[Run], reports: Sequence[Mapping[str, Any]], rows: Tensor
) -> dict[str, Any]:
    seeds = [run.seed for run, report in zip(runs, reports, strict=True) for _ in report["edits"]]
    parts = {seed: rows[torch.tensor([s == seed for s in seeds])] for seed in sorted(set(seeds))}
    by_seed = {seed: _floats(table_of(part)).get("score") for seed, part in parts.items()}
    found = {"records": len(rows[:, 0].unique()), **_floats(table_of(rows)), "score_by_seed": by_seed}
    return {"method": method, "edits": count, "runs": len(runs), **found}


def _floats(table: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in table.items()}


def by_count(results: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[Mapping[str, Any]]]]:
    """The rows of each number of edits."""
    counts = dict.fromkeys(row["edits"] for row in results)
    return [(count, [row for row in results if row["edits"] == count]) for count in counts]


def counted(row: Mapping[str, Any]) -> str:
    """The number of records of a row, and of its scores where several runs have the same records."""
    records, scores = row["records"], int(row["count"])
    return f"{records} record{'' if records == 1 else 's'}" + (f", {scores} scores" if scores != records else "")


def markdown_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """All results with their intervals as a Markdown table."""
    head = ["edits", "method", *METRICS, "vs. first", "records", "Score by seed", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in results:
        seeds = ", ".join("-" if score is None else f"{score:.1f}" for score in row["score_by_seed"].values())
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        cells = [str(row["edits"]), row["method"], *(score_cell(row, name) for name in (*METRICS, "difference"))]
        lines.append("| " + " | ".join([*cells, str(row["records"]), seeds, seconds]) + " |")
    return lines


def table_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The results for a terminal: for each number of edits a table, and what it shows in a sentence."""
    lines = []
    for count, rows in by_count(results):
        records = f", {counted(rows[0])}" if rows[0]["count"] != count else ""
        lines += [
            "",
            f"{count} edit{'' if count == 1 else 's'} in one edit batch{records}",
            *_aligned(rows),
            finding(rows),
        ]
    return lines


def _aligned(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table in columns, the names on the left and the numbers on the right."""
    first = next((row["method"] for row in rows if row["method"] != UNEDITED), "")
    table = [["", *METRICS[:-1], "Score", f"Score to {first}", "seconds"]]
    for row in rows:
        plain = [f"{row[name]:.1f}" if name in row else "-" for name in METRICS[:-1]]
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else "-"
        table.append([row["method"], *plain, score_cell(row, METRICS[-1]), score_cell(row, "difference"), seconds])
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    return [
        f"{name:{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        for name, *cells in table
    ]


def finding(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the methods of one number of edits come to, in words; empty without Scores."""
    scored = [row for row in rows if row["method"] != UNEDITED and "score" in row]
    if not scored:
        return ""
    best = max(round(row["score"], 1) for row in scored)
    names = ", ".join(row["method"] for row in scored if round(row["score"], 1) == best)
    text = f"Highest Score: {best:.1f} ({names})."
    reference, *others = scored
    for side in ("above", "below", ""):
        names = ", ".join(row["method"] for row in others if side_of(row) == side)
        if names:
            title = f"{side.capitalize()} {reference['method']} beyond chance" if side else "Not told apart from it"
            text += f" {title}: {names}."
    return text


def side_of(row: Mapping[str, Any]) -> str:
    """Whether a method's Score is ``above`` or ``below`` the first one's beyond chance, or neither (empty)."""
    if row.get("difference_low", -math.inf) > 0:
        return "above"
    return "below" if row.get("difference_high", math.inf) < 0 else ""


def limits_of(results: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """A range of Scores that holds those of most methods with their intervals; those far below would squeeze it."""
    scored = [row for row in results if row["method"] != UNEDITED and "score" in row]
    best = max((row["score"] for row in scored), default=0.0)
    low = min((row.get("score_low", row["score"]) for row in scored if row["score"] >= best - FAR), default=0.0)
    return max(0.0, 10 * math.floor((low - 1) / 10)), 101.0


def score_plot(results: Sequence[Mapping[str, Any]], limits: tuple[float, float] | None = None) -> Figure:
    """The Score of every method with its 95 % interval, a row for each, one chart for each number of edits.

    Args:
        results: Rows as in comparison.json.
        limits: The range of the Scores that is drawn; by default that of these results.
    """
    from matplotlib import rc_context

    groups = [(count, [row for row in rows if row["method"] != UNEDITED]) for count, rows in by_count(results)]
    heights = [0.4 + 0.26 * len(rows) for _, rows in groups]
    with rc_context(STYLE):
        figure, charts = panels(4.6, 0.6 + sum(heights), len(groups), 1, sharex=True, height_ratios=heights)
        for axes, (count, rows) in zip(charts, groups, strict=True):
            axes.set(title=f"{count:,} edit{'' if count == 1 else 's'}", xlim=limits or limits_of(results))
            _draw_scores(axes, rows)
        charts[-1].set_xlabel("Score")
    return figure


def _draw_scores(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """A disc with its interval for each method, in the color of its side, and its Score as a number on the right.

    A Score that is below the range is a triangle on its edge. The first method's goes through all as a line.
    """
    colors, least = {"above": GREEN, "below": ORANGE, "": MUTED}, axes.get_xlim()[0]
    for height, row in enumerate(rows):
        if "score" not in row:
            continue
        score, color = row["score"], colors[side_of(row)] if height else INK
        low, high = (row.get(f"score_{end}", score) for end in ("low", "high"))
        axes.plot([max(low, least), high], [height, height], color=color, lw=2, alpha=0.6, solid_capstyle="butt")
        axes.plot([max(score, least)], [height], "o" if score >= least else "<", color=color, clip_on=False)
        axes.text(1.03, height, f"{score:.1f}", color=color, va="center", transform=axes.get_yaxis_transform())
    if rows and "score" in rows[0]:
        axes.axvline(rows[0]["score"], color=INK, lw=0.8, ls=":")
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows], color=INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)

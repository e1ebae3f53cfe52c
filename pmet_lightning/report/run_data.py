"""The data of a run's report, as plain numbers and texts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pmet_lightning.data.encoder import fill
from pmet_lightning.data.records import Edit
from pmet_lightning.evaluation.scores import CORE, row_scores
from pmet_lightning.evaluation.verdict import Outcome
from pmet_lightning.report.html import number


def columns_of(points: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Points of curves, turned into one list of values for each curve."""
    return {name: [point[name] for point in points] for name in points[0]} if points else {}


def value_at(data: Any, *path: str) -> Any:
    """The value at a path of keys, or ``None``."""
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def rows_of(data: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The rows of a part of a report that have anything in them."""
    return [row for row in data.get(name) or [] if row]


def column(rows: Sequence[Any], *path: str) -> list[float]:
    """The number at a path of keys in each row, or NaN."""
    return [number(value_at(row, *path)) for row in rows]


def known(values: Sequence[float]) -> list[float]:
    """The values without NaN."""
    return [value for value in values if not math.isnan(value)]


def by_batch(curves: Mapping[str, Any]) -> list[list[dict[str, float]]]:
    """The points of curves that :func:`columns_of` has joined, for each edit batch; the step of each begins anew."""
    names = [name for name in curves if curves[name]]
    batches: list[list[dict[str, float]]] = []
    for index, values in enumerate(zip_longest(*(curves[name] for name in names))):
        point = dict(zip(names, map(number, values), strict=True))
        point["step"] = float(index) if math.isnan(point.get("step", math.nan)) else point["step"]
        if not batches or point["step"] <= batches[-1][-1]["step"]:
            batches.append([])
        batches[-1].append(point)
    return batches


def edit_lines(
    edits: Sequence[Edit], ledger: Iterable[Mapping[str, Any]], rows: Mapping[str, Tensor], first: int = 0
) -> list[dict[str, Any]]:
    """A line for every edit: its ledger line, if there is one, and its scores before and after.

    Args:
        edits: All edits, by position; empty for a stream, whose edits are known from the ledger only.
        ledger: Ledger lines of the first of them, or of those from ``first`` on.
        rows: Score rows of all records by phase, as :meth:`EditScores.record_rows` gives them.
        first: Position of the first line of the ledger.
    """
    shown = {phase: table[table[:, 0] >= first] for phase, table in rows.items()}
    scores = {phase: {int(row[0]): row_scores(row) for row in table} for phase, table in shown.items()}
    lines = iter(ledger)
    described = ({**_described(edit), **next(lines, {})} for edit in edits) if edits else map(_with_question, lines)
    return [
        line | {phase: found.get(position, {}) for phase, found in scores.items()}
        for position, line in enumerate(described, start=first)
    ]


def add_outcomes(lines: Sequence[dict[str, Any]], outcomes: Sequence[Outcome], first: int = 0) -> None:
    """Add to the lines of the edits how each ended: ``said``, ``cause`` and the model's last ``answer``.

    Args:
        lines: As :func:`edit_lines` gives them.
        outcomes: The outcome of each edit that was written, from the first one on.
        first: Position of the first line.
    """
    for line, outcome in zip(lines, outcomes[first:], strict=False):
        line |= {"answer": outcome.answer, "said": outcome.said, "cause": outcome.cause}


def _described(edit: Edit) -> dict[str, Any]:
    return {
        "case_id": edit.case_id,
        "question": edit.question,
        "target": edit.target,
        "target_true": edit.target_true,
        "relation": edit.relation,
    }


def _with_question(line: Mapping[str, Any]) -> dict[str, Any]:
    """A ledger line with its question."""
    return dict(line) | {"question": fill(line["prompt"], line["subject"])[0]}


def relation_lines(lines: Sequence[Mapping[str, Any]], phases: Iterable[str]) -> list[dict[str, Any]]:
    """Means over the edits of each relation, the most frequent relation first; none without relations.

    Args:
        lines: As :func:`edit_lines` gives them.
        phases: The evaluations that the lines have scores of.
    """
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["relation"]:
            groups[line["relation"]].append(line)
    found = [
        {"relation": relation, "count": len(group)}
        | {phase: _means([line[phase] for line in group]) for phase in phases}
        for relation, group in groups.items()
    ]
    return sorted(found, key=lambda line: (-line["count"], line["relation"]))


def saved_settings(folder: Path) -> dict[str, Any]:
    """The configuration that is saved in the run folder; empty for a run without one."""
    path = folder / "config.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _means(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    found = {name: [table[name] for table in tables if name in table] for name in CORE}
    return {name: sum(values) / len(values) for name, values in found.items() if values}

"""A summary of the journal at the end of a run, read one edit batch at a time.

Legend: N = records, C = position and scores, as :func:`~pmet_lightning.evaluation.scores.record_rows` makes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pmet_lightning.evaluation.scores import METRICS, table_of


@dataclass(frozen=True)
class Summary:
    """What is collected from the journal's entries.

    Attributes:
        layers: A line for each write.
        curves: Points of the inner steps.
        batches: For each edit batch that was evaluated, its scores right after it was written and after all of them,
            and the difference.
        rows: Score rows of the records right before (``before``) and right after (``after``) their edit batch was
            written, shape [N, C]; without phases that were not evaluated.
    """

    layers: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, float]] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, Tensor] = field(default_factory=dict)


def summary_of(entries: Iterable[Mapping[str, Any]], final_NC: Tensor | None) -> Summary:
    """Summarize the journal, without keeping its entries.

    Args:
        entries: Entries of the journal.
        final_NC: Rows of all records after the last edit batch; ``None`` for a stream, whose end is not evaluated.
    """
    found = Summary()
    parts: dict[str, list[Tensor]] = {"before": [], "after": []}
    start = 0
    for entry in entries:
        found.layers.extend(entry["layers"])
        found.curves.extend(entry["curves"])
        if entry.get("before"):
            parts["before"].append(rows_of(entry["before"]))
        if entry.get("at_once"):
            rows = rows_of(entry["at_once"])
            parts["after"].append(rows)
            end = None if final_NC is None else final_NC[start : start + len(rows)]
            found.batches.append({"edit_batch": entry["edit_batch"], **_tables(rows, end)})
            start += len(rows)
    found.rows.update({phase: torch.cat(tables) for phase, tables in parts.items() if tables})
    return found


def plain_rows(rows_NC: Tensor | None) -> list[list[float | None]] | None:
    """Rows as JSON can hold them: null for NaN."""
    return None if rows_NC is None else [[None if v != v else v for v in row] for row in rows_NC.tolist()]


def rows_of(plain: Sequence[Sequence[float | None]]) -> Tensor:
    """The rows that :func:`plain_rows` has converted, float64."""
    return torch.tensor([[math.nan if v is None else v for v in row] for row in plain], dtype=torch.float64)


def _tables(at_once_NC: Tensor, end_NC: Tensor | None) -> dict[str, dict[str, float]]:
    """Scores of an edit batch right after it and at the end."""
    once = {name: float(value) for name, value in table_of(at_once_NC).items()}
    if end_NC is None:
        return {"at_once": once}
    end = {name: float(value) for name, value in table_of(end_NC).items()}
    return {
        "at_once": once,
        "at_the_end": end,
        "forgotten": {name: once[name] - end[name] for name in METRICS if name in once},
    }

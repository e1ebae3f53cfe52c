"""Efficacy, generalisation, specificity and Score as a metric that reduces over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pmet_lightning.edits.records import ProbeKind
from pmet_lightning.metrics.functional import FREE_KINDS, ProbeResult, harmonic_mean

KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)
CORE: tuple[ProbeKind, ...] = ("efficacy", "generalisation", "specificity")
METRICS = (*CORE, "score")
_RESAMPLES = 1000
_SUFFIXES = {"success": "", "magnitude": "_magnitude", "exact": "_exact", "contains": "_contains"}
_COLUMNS = {f"{kind}{suffix}": (kind, field) for field, suffix in _SUFFIXES.items() for kind in KINDS}


class EditScores(Metric):
    """Mean over the questions of a record first, then over records, times 100 (EVALUATION.md).

    ``compute`` gives, for each of efficacy, generalisation, specificity, portability and multihop (the best of a
    record's questions), and for the score (the harmonic mean of the first three), the
    value, ``…_low`` and ``…_high`` (95 % bootstrap interval over records, seeded) and, but for the score,
    ``…_magnitude``; and ``count``, the records. A metric without questions is left out, and so is the score
    then. What was asked in free generation adds ``…_exact``, ``…_contains`` and ``…_gap``, the teacher-forced
    value minus ``…_contains``.
    """

    full_state_update = False
    higher_is_better = True
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, results: Sequence[Sequence[ProbeResult]]) -> None:
        """Add the records of one batch."""
        if results:
            self.rows.append(record_rows(results).to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """The table described above; empty without records."""
        return table_of(dim_zero_cat(self.rows).cpu()) if len(self.rows) else {}


def record_rows(results: Sequence[Sequence[ProbeResult]]) -> Tensor:
    """Means of each record, float64, shape [records, columns]; NaN where a record has no such question."""
    return torch.tensor([_record_means(record) for record in results], dtype=torch.float64)


def table_of(record_rows_NC: Tensor) -> dict[str, Tensor]:
    """The table of :class:`EditScores` from the rows of some records."""
    rows = 100 * record_rows_NC
    asked = {name: i for i, name in enumerate(_COLUMNS) if not rows[:, i].isnan().all()}
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(rows), (_RESAMPLES, len(rows)), generator=generator)
    means = {name: rows[:, i].nanmean() for name, i in asked.items()}
    resampled = {name: rows[picks, i].nanmean(dim=1) for name, i in asked.items() if "magnitude" not in name}
    table = {"count": torch.tensor(float(len(rows)))}
    for name, mean in means.items():
        table |= _with_interval(name, mean, resampled[name]) if name in resampled else {name: mean}
    for kind in FREE_KINDS:
        if f"{kind}_contains" in asked:
            gaps = [values[kind] - values[f"{kind}_contains"] for values in (means, resampled)]
            table |= _with_interval(f"{kind}_gap", *gaps)
    if all(kind in asked for kind in CORE):
        both = [torch.stack([values[kind] for kind in CORE], dim=-1) for values in (means, resampled)]
        table |= _with_interval("score", *map(harmonic_mean, both))
    return table


def _record_means(record: Sequence[ProbeResult]) -> list[float]:
    """The mean of each of the columns; NaN where a record has no such question."""
    means = []
    for kind, field in _COLUMNS.values():
        values = [getattr(result, field) for result in record if result.kind == kind]
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known else float("nan")
        # MQuAKE asks a question in three wordings and counts it if any is answered.
        means.append(max(known, default=mean) if kind == "multihop" else mean)
    return means


def _with_interval(name: str, value: Tensor, resampled: Tensor) -> dict[str, Tensor]:
    low, high = resampled.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {name: value, f"{name}_low": low, f"{name}_high": high}

"""Efficacy, generalisation, specificity and Score as a metric that reduces over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pmet_lightning.edits.records import ProbeKind
from pmet_lightning.metrics.functional import ProbeResult, harmonic_mean

KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)
METRICS = (*KINDS, "score")
_RESAMPLES = 1000


class EditScores(Metric):
    """Mean over the questions of a record first, then over records, times 100 (EVALUATION.md).

    ``compute`` gives, for each of efficacy, generalisation, specificity and score (their harmonic mean), the
    value, ``…_low`` and ``…_high`` (95 % bootstrap interval over records, seeded) and, but for the score,
    ``…_magnitude``; and ``count``, the records. A metric without questions is left out, and so is the score
    then.
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
            rows = [_record_means(record) for record in results]
            self.rows.append(torch.tensor(rows, dtype=torch.float64, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """The table described above; empty without records."""
        if not len(self.rows):
            return {}
        rows = dim_zero_cat(self.rows).cpu()
        success, magnitude = 100 * rows[:, : len(KINDS)], 100 * rows[:, len(KINDS) :]
        asked = ~success.isnan().all(dim=0)
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(rows), (_RESAMPLES, len(rows)), generator=generator)
        means, resampled = success.nanmean(dim=0), success[picks].nanmean(dim=1)
        table = {"count": torch.tensor(float(len(rows)))}
        for column, kind in enumerate(KINDS):
            if asked[column]:
                table |= _with_interval(kind, means[column], resampled[:, column])
                table[f"{kind}_magnitude"] = magnitude[:, column].nanmean()
        if asked.all():
            table |= _with_interval("score", harmonic_mean(means), harmonic_mean(resampled))
        return table


def _record_means(record: Sequence[ProbeResult]) -> list[float]:
    """Mean success, then mean magnitude, of each kind; NaN where a record has no such question."""
    means = []
    for field in ("success", "magnitude"):
        for kind in KINDS:
            values = [getattr(result, field) for result in record if result.kind == kind]
            means.append(sum(values) / len(values) if values else float("nan"))
    return means


def _with_interval(name: str, value: Tensor, resampled: Tensor) -> dict[str, Tensor]:
    low, high = resampled.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {name: value, f"{name}_low": low, f"{name}_high": high}

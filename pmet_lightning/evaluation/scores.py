"""Efficacy, generalisation, specificity and Score as a metric that reduces over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pmet_lightning.data.records import ProbeKind
from pmet_lightning.evaluation.bootstrap import confidence_interval, resample_means
from pmet_lightning.evaluation.probes import FREE_KINDS, ProbeResult, RecordResult, harmonic_mean

KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)
CORE: tuple[ProbeKind, ...] = ("efficacy", "generalisation", "specificity")
METRICS = (*CORE, "score")
TEXTS = ("fluency", "consistency")
_SUFFIXES = {
    "success": "",
    "magnitude": "_magnitude",
    "accuracy": "_accuracy",
    "exact": "_exact",
    "contains": "_contains",
}
_COLUMNS: dict[str, tuple[ProbeKind, str]] = {
    f"{kind}{suffix}": (kind, field) for field, suffix in _SUFFIXES.items() for kind in KINDS
} | {f"specificity_{field}": ("specificity", field) for field in ("kept", "kl", "top1", "top5", "top10")}
NAMES = (*_COLUMNS, *TEXTS)
# Rows hold means as measured; tables hold percentages, except for a divergence, which is in nats.
SCALES = torch.tensor([1.0 if name == "specificity_kl" else 100.0 for name in NAMES], dtype=torch.float64)


class EditScores(Metric):
    """Mean over the questions of a record first, then over records, times 100 (docs/evaluation.md).

    ``compute`` gives, for each of efficacy, generalisation, specificity, portability and multihop (the best of a
    record's questions), and for the score (the harmonic mean of the first three), the value, ``…_low`` and
    ``…_high`` (95 % bootstrap interval over records, seeded; none of a single record); and ``count``, the records.
    Except for the score there are also ``…_magnitude`` and ``…_accuracy`` (every token of the answer is the
    argmax). What was asked in free generation adds ``…_exact``, ``…_contains`` and ``…_gap``, the teacher-forced
    value minus ``…_contains``; what was asked of the unedited model too adds ``specificity_kept`` (the neighbors'
    answers, token by token), ``specificity_kl`` (nats) and ``specificity_top1``, ``…_top5`` and ``…_top10``
    (overlap of the likeliest next tokens); texts add ``fluency`` and ``consistency``. What was not asked is left
    out, and so is the score without its three parts.

    Records are identified by their position: one that several processes have seen counts once.
    """

    full_state_update = False
    higher_is_better = True
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, results: Sequence[RecordResult]) -> None:
        """Add the records of one batch."""
        if results:
            self.rows.append(record_rows(results).to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """The table described above; empty without records."""
        return table_of(self.record_rows()) if len(self.rows) else {}

    def record_rows(self) -> Tensor:
        """The rows of all records by position, as :func:`record_rows` makes them, on the CPU."""
        rows = dim_zero_cat(self.rows).cpu()
        order = rows[:, 0].argsort(stable=True)
        rows = rows[order]
        first = torch.ones(len(rows), dtype=torch.bool)
        first[1:] = rows[1:, 0] != rows[:-1, 0]
        return rows[first]


def record_rows(results: Sequence[RecordResult]) -> Tensor:
    """Position and means of each record, float64, shape [records, 1 + columns]; NaN for what was not asked."""
    rows = [[float(result.position), *_record_means(result.probes), *_text_scores(result)] for result in results]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 1 + len(NAMES))


def row_scores(row_C: Tensor) -> dict[str, float]:
    """The scores in a row by name, as in a table; without what was not asked."""
    values = (row_C[1:] * SCALES).tolist()
    return {name: value for name, value in zip(NAMES, values, strict=True) if value == value}


def table_of(record_rows_NC: Tensor) -> dict[str, Tensor]:
    """The table of :class:`EditScores` from the rows of some records; those with equal positions are of one record."""
    ids_N, rows = record_rows_NC[:, 0], SCALES * record_rows_NC[:, 1:]
    asked = {name: i for i, name in enumerate(NAMES) if not rows[:, i].isnan().all()}
    means = {name: rows[:, i].nanmean() for name, i in asked.items()}
    with_interval = [name for name in asked if "magnitude" not in name]
    columns = rows[:, [asked[name] for name in with_interval]]
    resampled = dict(zip(with_interval, resample_means(columns, ids_N), strict=True))
    counts = {name: len(ids_N[~rows[:, asked[name]].isnan()].unique()) for name in with_interval}
    table = {"count": torch.tensor(float(len(rows)))}
    for name, mean in means.items():
        table |= _with_interval(name, mean, resampled[name], counts[name]) if name in resampled else {name: mean}
    for kind in FREE_KINDS:
        if f"{kind}_contains" in asked:
            gap, gaps = (values[kind] - values[f"{kind}_contains"] for values in (means, resampled))
            table |= _with_interval(f"{kind}_gap", gap, gaps, counts[kind])
    if all(kind in asked for kind in CORE):
        score, scores = (
            harmonic_mean(torch.stack([values[kind] for kind in CORE], dim=-1)) for values in (means, resampled)
        )
        table |= _with_interval("score", score, scores, len(ids_N.unique()))
    return table


def score_difference(record_rows_NC: Tensor, others_NC: Tensor) -> dict[str, Tensor]:
    """How much higher one Score is than another on the same records, by a paired bootstrap.

    Pairing removes what makes a record easy or hard for both, so that this tells more than two intervals.

    Args:
        record_rows_NC: Rows of the one, as :func:`record_rows` makes them.
        others_NC: Rows of the other, of the same records in the same order.

    Returns:
        ``difference``, ``difference_low`` and ``difference_high``, in points of the Score; likewise
        ``specificity_difference`` and so on for each of its parts.
    """
    columns = [1 + NAMES.index(kind) for kind in CORE]
    both = [100 * rows[:, columns] for rows in (record_rows_NC, others_NC)]
    ids_N = record_rows_NC[:, 0]
    means, others = (rows.nanmean(dim=0) for rows in both)
    resampled_BK, others_BK = (resample_means(rows, ids_N).T for rows in both)
    count = len(ids_N.unique())
    value = harmonic_mean(means) - harmonic_mean(others)
    found = _with_interval("difference", value, harmonic_mean(resampled_BK) - harmonic_mean(others_BK), count)
    for kind, part, parts_B in zip(CORE, means - others, (resampled_BK - others_BK).T, strict=True):
        found |= _with_interval(f"{kind}_difference", part, parts_B, count)
    return found


def _record_means(record: Sequence[ProbeResult]) -> list[float]:
    """The mean of each of the columns; NaN where a record has no such question."""
    means = []
    for kind, field in _COLUMNS.values():
        values = [getattr(result, field) for result in record if result.kind == kind]
        measured = [value for value in values if value is not None]
        mean = sum(measured) / len(measured) if measured else float("nan")
        # MQuAKE asks a question in three phrasings and counts it if any is answered.
        means.append(max(measured, default=mean) if kind == "multihop" else mean)
    return means


def _text_scores(result: RecordResult) -> list[float]:
    values = (getattr(result, name) for name in TEXTS)
    return [float("nan") if value is None else value for value in values]


def _with_interval(name: str, value: Tensor, resampled: Tensor, count: int) -> dict[str, Tensor]:
    """A value with its interval; the resamples of a single record are all that record, and say nothing."""
    if count < 2:
        return {name: value}
    low, high = confidence_interval(resampled)
    return {name: value, f"{name}_low": low, f"{name}_high": high}

"""Values of each fact with named axes, and their means with bootstrap intervals over facts.

Legend: N = facts, M = everything else, B = resamples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pmet_lightning.evaluation.bootstrap import RESAMPLES, confidence_interval, resample_ratios

LEAST_FACTS = 10  # with fewer, bootstrap intervals are too narrow; with one they have no width
TOO_FEW = "too few facts to say"


@dataclass(frozen=True)
class Measure:
    """One measured quantity.

    Attributes:
        values: Shape [N, ...], an axis for each of ``axes``; NaN if a fact has no such value.
        axes: The labels along each axis, by the name of the axis.
    """

    values: Tensor
    axes: Mapping[str, Sequence[Any]]

    def at(self, **labels: Any) -> Tensor:
        """Values at some labels, such as ``at(token="last")``; the named axes are dropped."""
        values = self.values
        for axis in reversed(list(self.axes)):
            if axis in labels:
                values = values.select(1 + list(self.axes).index(axis), list(self.axes[axis]).index(labels[axis]))
        return values

    def of(self, facts: Sequence[int]) -> Measure:
        """The measure of some of the facts, by their indices."""
        return replace(self, values=self.values[list(facts)])

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each combination of labels: the labels, mean, 95 % interval and number of facts."""
        summary = summarize(self.values)
        combinations = itertools.product(*self.axes.values())
        columns = (column.flatten().tolist() for column in summary)
        for combination, mean, low, high, count in zip(combinations, *columns, strict=True):
            if count:
                yield dict(zip(self.axes, combination, strict=True)) | {
                    "mean": mean, "low": low, "high": high, "count": int(count)
                }  # fmt: skip


def concatenate_measures(parts: Sequence[Measure]) -> Measure:
    """Concatenate measures with the same axes along the facts."""
    return replace(parts[0], values=torch.cat([part.values for part in parts]))


def resampled_means(values_NM: Tensor) -> Tensor:
    """Means over facts drawn with replacement, shape [B, ...]; seeded, with the same draws for all columns.

    Args:
        values_NM: Shape [N, ...]; NaN is ignored.
    """
    flat = values_NM.double().reshape(len(values_NM), -1)
    present = (~flat.isnan()).double()
    return resample_ratios(flat.nan_to_num(), present).reshape(RESAMPLES, *values_NM.shape[1:])


def summarize(values_NM: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, both ends of its 95 % bootstrap interval, and number of facts, of each column."""
    shape = values_NM.shape[1:]
    low, high = confidence_interval(resampled_means(values_NM).reshape(RESAMPLES, -1))
    count = (~values_NM.isnan()).sum(dim=0)
    return values_NM.double().nanmean(dim=0), low.reshape(shape), high.reshape(shape), count


def interval(values_N: Tensor) -> dict[str, float]:
    """Mean, 95 % bootstrap interval and number of facts, of one value for each fact."""
    mean, low, high, count = (float(value) for value in summarize(values_N))
    return {"mean": mean, "low": low, "high": high, "count": int(count)}

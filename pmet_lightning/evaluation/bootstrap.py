"""Bootstrap over records or facts, seeded, so that a result is the same wherever it is computed.

Legend: N = records, G = those of them that differ, B = resamples, K = columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

RESAMPLES = 1000
_INTERVAL = (0.025, 0.975)
MOST_INDICES = 2**21  # at a time: 16 MiB, and as much again for the values picked


def bootstrap_indices(count: int) -> Iterator[Tensor]:
    """Indices of the records in each resample, some resamples at a time.

    Int64, shape [b, N], B rows in all, drawn with replacement; the same at every call.
    """
    generator = torch.Generator().manual_seed(0)
    most = max(1, MOST_INDICES // count)
    for first in range(0, RESAMPLES, most):
        yield torch.randint(count, (min(most, RESAMPLES - first), count), generator=generator)


def resample_means(columns_NK: Tensor, ids_N: Tensor | None = None) -> Tensor:
    """Means of each column over each resample of :func:`bootstrap_indices`, shape [K, B]; NaN is ignored.

    Only some resamples are held at a time, so that memory does not grow with their number times that of the records.

    Args:
        columns_NK: Values.
        ids_N: Which record each row is of. Rows of one record, as several seeds give, are not independent: a resample
            has all of them or none (cluster bootstrap). ``None``: no record occurs twice.
    """
    if ids_N is not None:
        distinct, cluster_N = ids_N.unique(return_inverse=True)
        if len(distinct) < len(ids_N):
            return _resample_clusters(columns_NK, cluster_N, len(distinct))
    columns = [column.contiguous() for column in columns_NK.unbind(dim=1)]
    has_nan = [bool(column.isnan().any()) for column in columns]
    # Allocated once: small tensors kept between large temporary ones would keep the heap from reusing those.
    means_KB = torch.empty(len(columns), RESAMPLES, dtype=columns_NK.dtype)
    first = 0
    for picks_bN in bootstrap_indices(len(columns_NK)):
        last = first + len(picks_bN)
        for k, (column, with_nan) in enumerate(zip(columns, has_nan, strict=True)):
            # Without NaN the plain mean is the same to the last bit, in half the time.
            means_KB[k, first:last] = _mean(column.take(picks_bN), with_nan)
        first = last
    return means_KB


def _resample_clusters(columns_NK: Tensor, cluster_N: Tensor, count: int) -> Tensor:
    """Means over resamples of records that have several rows each."""
    zeros_GK = columns_NK.new_zeros(count, columns_NK.shape[1])
    sums_GK = zeros_GK.index_add(0, cluster_N, columns_NK.nan_to_num(0.0))
    rows_GK = zeros_GK.index_add(0, cluster_N, (~columns_NK.isnan()).to(columns_NK))
    return resample_ratios(sums_GK, rows_GK).T


def resample_ratios(sums_GK: Tensor, counts_GK: Tensor) -> Tensor:
    """Sums over counts, of each column over each resample of :func:`bootstrap_indices`, shape [B, K]."""
    ratios = []
    for picks_bG in bootstrap_indices(len(sums_GK)):
        ones = sums_GK.new_ones(1).expand(picks_bG.shape)
        weights_bG = sums_GK.new_zeros(picks_bG.shape).scatter_add_(1, picks_bG, ones)
        ratios.append((weights_bG @ sums_GK) / (weights_bG @ counts_GK))
    return torch.cat(ratios)


def confidence_interval(resampled_B: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends of the 95 % interval, along the first axis; NaN is ignored."""
    low, high = resampled_B.nanquantile(torch.tensor(_INTERVAL, dtype=torch.float64), dim=0)
    return low, high


def _mean(picked_bN: Tensor, with_nan: bool) -> Tensor:
    return picked_bN.nanmean(dim=1) if with_nan else picked_bN.sum(dim=1) / picked_bN.shape[1]

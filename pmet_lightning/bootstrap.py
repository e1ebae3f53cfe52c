"""Bootstrap over records or facts, seeded, so that a result is the same wherever it is made.

Legend: N = records, B = resamples.
"""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 1000
_INTERVAL = (0.025, 0.975)


def picks_of(count: int) -> Tensor:
    """Which records each resample holds: int64, shape [B, N], drawn with replacement; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(count, (RESAMPLES, count), generator=generator)


def interval_of(resampled_B: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends of the 95 % interval, along the first axis; NaN is left out."""
    low, high = resampled_B.nanquantile(torch.tensor(_INTERVAL, dtype=torch.float64), dim=0)
    return low, high

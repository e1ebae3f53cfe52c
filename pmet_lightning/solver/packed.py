"""Symmetric and triangular matrices stored as one triangle.

Legend: I = rows and columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_ROWS = 512


def pack_lower(symmetric_II: Tensor) -> Tensor:
    """The lower triangle of a symmetric matrix, row by row, shape [I · (I + 1) / 2]."""
    return torch.cat([row[: i + 1] for i, row in enumerate(symmetric_II)])


def unpack_symmetric(packed: Tensor, width: int) -> Tensor:
    """The symmetric matrix of :func:`pack_lower`, shape [I, I]."""
    return symmetrize(unpack_lower(packed, width))


def symmetrize(lower_II: Tensor) -> Tensor:
    """Fill the upper triangle from the lower one, in place: such matrices are too large to copy."""
    for start in range(0, len(lower_II), BLOCK_ROWS):
        end = start + BLOCK_ROWS
        lower_II[:start, start:end] = lower_II[start:end, :start].T
        diagonal = lower_II[start:end, start:end]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
    return lower_II


def unpack_lower(packed: Tensor, width: int) -> Tensor:
    """The lower triangular matrix of :func:`pack_lower`, zero above the diagonal, shape [I, I]."""
    lower_II = packed.new_zeros(width, width)
    start = 0
    for i in range(width):
        lower_II[i, : i + 1] = packed[start : start + i + 1]
        start += i + 1
    return lower_II


def unpack_products(packed: Tensor, device: torch.device) -> Tensor:
    """The symmetric matrix of :func:`pack_lower`, unpacked on a device, shape [I, I]."""
    return unpack_symmetric(packed.to(device), (math.isqrt(8 * len(packed) + 1) - 1) // 2)

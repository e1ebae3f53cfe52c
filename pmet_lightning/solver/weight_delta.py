"""ΔW of one weight: a matrix or, where they are smaller, the two factors in which the solve gives it.

ΔW of N edits is E Kᵀ (λC + KKᵀ)⁻¹, the product of N residuals and N rows of inputs: its rank is at most N.
Legend: R = rows of the factors, O = out-features (d), I = in-features (d_k), S = any number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def factors_are_smaller(count: int, out_features: int, in_features: int) -> bool:
    """Whether factors of so many rows are fewer numbers than the matrix."""
    return count * (out_features + in_features) < out_features * in_features


@dataclass(frozen=True)
class WeightDelta:
    """ΔW = leftᵀ · right or, without a left factor, the matrix itself.

    Attributes:
        right: Shape [R, I], or the matrix, shape [O, I].
        left: Shape [R, O], or ``None``.
    """

    right: Tensor
    left: Tensor | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> WeightDelta:
        """From what :attr:`tensors` gives."""
        *left, right = tensors
        return cls(right, *left)

    @property
    def shape(self) -> tuple[int, int]:
        """Out-features and in-features."""
        out_features = self.right.shape[0] if self.left is None else self.left.shape[1]
        return int(out_features), int(self.right.shape[1])

    @property
    def rank(self) -> int | None:
        """Rows of the factors, an upper bound of the rank; ``None`` for a matrix."""
        return None if self.left is None else len(self.left)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored: the matrix, or left and right factor."""
        return (self.right,) if self.left is None else (self.left, self.right)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of its numbers."""
        return self.right.dtype

    def dense(self) -> Tensor:
        """The matrix, shape [O, I], in its own dtype; summed in float64, so that every program gets the same bits."""
        if self.left is None:
            return self.right
        return (self.left.to(torch.float64).T @ self.right.to(torch.float64)).to(self.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Left and right factor, shapes [R, O] and [R, I]; of a matrix, itself and the identity."""
        if self.left is not None:
            return self.left, self.right
        out_features, in_features = self.shape
        identity = torch.eye(min(self.shape), dtype=self.dtype, device=self.right.device)
        return (identity, self.right) if out_features <= in_features else (self.right.T.contiguous(), identity)

    def from_row(self, start: int) -> WeightDelta:
        """Without the first rows of its factors, which are zero in the left one; a matrix as it is."""
        return self if self.left is None else WeightDelta(self.right[start:].clone(), self.left[start:].clone())

    def to(self, device_or_dtype: torch.device | torch.dtype) -> WeightDelta:
        """The same on a device or in a dtype."""
        return WeightDelta.of([tensor.to(device_or_dtype) for tensor in self.tensors])

    def norm(self) -> float:
        """‖ΔW‖, Frobenius."""
        right = self.right.to(torch.float64)
        if self.left is None:
            return float(right.norm())
        left = self.left.to(torch.float64)
        return float(((left @ left.T) * (right @ right.T)).sum().clamp_min(0).sqrt())

    def times_rows(self, rows_SO: Tensor) -> Tensor:
        """rows · ΔW, shape [S, I]."""
        return rows_SO @ self.right if self.left is None else (rows_SO @ self.left.T) @ self.right


def total(parts: Sequence[WeightDelta]) -> WeightDelta:
    """The sum: factors one after the other while that is smaller than the matrix.

    Args:
        parts: At least one, all of one shape, dtype and device.
    """
    left = [part.left for part in parts if part.left is not None]
    rank = sum(map(len, left))
    if len(left) == len(parts) and factors_are_smaller(rank, *parts[0].shape):
        return WeightDelta(torch.cat([part.right for part in parts]), torch.cat(left))
    summed = parts[0].dense()
    for part in parts[1:]:
        summed = summed + part.dense()
    return WeightDelta(summed)

"""Cholesky factors in float64, with the smallest ridge that makes the matrix positive definite.

Legend: I = in-features (d_k).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)


# Ridges tried in turn, relative to the mean diagonal, when the system is not positive definite.
RIDGES = (0.0, 1e-12, 1e-10, 1e-8, 1e-6)


class Factor(NamedTuple):
    """A Cholesky factor, and the ridge that it needed.

    Attributes:
        lower_II: L of A + ridge = L Lᵀ, float64, shape [I, I].
        ridge: What was added to the diagonal of A (usually 0).
    """

    lower_II: Tensor
    ridge: float


def factorize(build: Callable[[], Tensor]) -> Factor:
    """Cholesky factor of a positive semidefinite matrix, with the smallest ridge that makes it positive definite.

    Args:
        build: Makes C, or λC + KKᵀ, float64, shape [I, I], at least its lower triangle. The factor overwrites it,
            so it is built again for every ridge that is tried.

    Raises:
        FloatingPointError: If no small ridge is enough.
    """
    for relative in RIDGES:
        matrix_II = build()
        ridge = relative * float(matrix_II.diagonal().mean())
        matrix_II.diagonal().add_(ridge)
        if factorize_in_place(matrix_II):
            if ridge:
                log.warning("the system is singular (dead key dimensions): factorized with a ridge of %.1e", ridge)
            return Factor(matrix_II, ridge)
        del matrix_II
    raise FloatingPointError(
        f"the system is not positive definite even with a ridge of {RIDGES[-1]:g} times its mean diagonal; "
        "collect the second moments over more text"
    )


def condition_bound(lower_II: Tensor) -> float:
    """A lower bound on the condition number of L Lᵀ, from the diagonal of L alone.

    Every pivot l² lies between the smallest and the largest eigenvalue.
    """
    pivots_I = lower_II.diagonal().square()
    return float(pivots_I.max() / pivots_I.min())


def factorize_in_place(matrix_II: Tensor) -> bool:
    """Overwrite a matrix, or its lower triangle, with its lower Cholesky factor; false if not positive definite."""
    # On a CPU, LAPACK works on memory in column-major order; on a GPU, torch expects row-major order.
    view_II = matrix_II if matrix_II.is_cuda else matrix_II.T
    info = torch.empty((), dtype=torch.int32, device=matrix_II.device)
    torch.linalg.cholesky_ex(view_II, upper=not matrix_II.is_cuda, out=(view_II, info))
    return int(info) == 0 and bool(matrix_II.diagonal().isfinite().all())

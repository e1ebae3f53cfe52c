"""λ by a rule: as much weight on the second moments as keeps what they stand for nearly as it was.

W maps keys of general text to values whose mean square is tr(W C Wᵀ); ΔW changes these values by tr(ΔW C ΔWᵀ) in the
mean square. Their ratio has no unit, and it falls as λ grows.

Legend: I = in-features (d_k), O = out-features (d).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pmet_lightning.solver.update import Solution
from pmet_lightning.solver.weight_delta import WeightDelta

_FACTOR = 10.0  # by which λ grows until the bound holds
_TOLERANCE = 0.02  # relative, below the bound
_MOST_SOLVES = 30


def mean_square(matrix: WeightDelta, moment_II: Tensor) -> float:
    """tr(A C Aᵀ), the mean square of A k over the keys that C stands for, in float64.

    Args:
        matrix: A, shape [O, I].
        moment_II: C, shape [I, I].
    """
    left, right = matrix.factors()
    right = right.to(torch.float64)
    product = right @ moment_II.to(right) @ right.T
    left = left.to(product)
    return float((product * (left @ left.T)).sum())


def share_of_change(count: int, past: int, width: int) -> float:
    """The share of the largest change that an edit batch may make: what it adds to N/(N + d_k) of all facts.

    What a few edits do to other keys adds up; many fill the key dimensions. Earlier edit batches have had their part,
    so that all together may change as much as one edit batch of the same facts.

    Args:
        count: Edits of the edit batch.
        past: Facts written before that stay.
        width: d_k.
    """
    facts = past + count
    return facts / (facts + width) - past / (past + width)


def solve_bounded(
    solve: Callable[[float], Solution], change: Callable[[Solution], float], lam: float, bound: float
) -> tuple[Solution, float]:
    """The solution with the smallest λ from ``lam`` on whose change is within a bound.

    The change falls monotonically with λ; its logarithm is nearly linear in that of λ, so that a few solves are enough.

    Args:
        solve: Solves with a λ.
        change: The change that a solution makes.
        lam: The smallest λ.
        bound: The largest change; the one that is found is within 2 % of it, unless the smallest λ makes less.

    Returns:
        The solution, and its λ.

    Raises:
        FloatingPointError: If no λ keeps the bound.
    """
    solution, high = solve(lam), lam
    high_change = change(solution)
    if high_change <= bound:
        return solution, lam
    for _ in range(_MOST_SOLVES):
        low, low_change, high = high, high_change, high * _FACTOR
        solution = solve(high)
        high_change = change(solution)
        if high_change <= bound:
            break
    else:
        raise FloatingPointError(f"no λ up to {high:.3g} keeps the change of preserved values below {bound:g} of them")
    for _ in range(_MOST_SOLVES):
        if high_change >= bound * (1 - _TOLERANCE):
            break
        between = _between(low, low_change, high, high_change, bound * (1 - _TOLERANCE / 2))
        tried = solve(between)
        found = change(tried)
        if found > bound:
            low, low_change = between, found
        else:
            high, high_change, solution = between, found, tried
    return solution, high


def _between(low: float, low_change: float, high: float, high_change: float, wanted: float) -> float:
    """λ at which the line through two points, in logarithms, has the wanted change; well inside of the interval."""
    share = math.log(wanted / low_change) / math.log(high_change / low_change)
    return low * (high / low) ** min(max(share, 0.05), 0.95)

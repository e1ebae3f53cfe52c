"""The closed-form update of one weight (docs/method.md, 'The write'): pure functions in float64.

An I × I matrix for 16,384 key dimensions takes 2.1 GB, so only one is held: the system is summed in blocks into the
memory in which it is then factorized, keys are converted to float64 a block at a time, and the update overwrites the
right-hand side.

Where that is smaller, ΔW stays in two factors: the residuals, and the keys to which the inverse is applied.

Legend: N = edits, I = in-features (d_k), O = out-features (d), X = any number of rows, R = directions of the
null space, S = random sign vectors of the error estimate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pmet_lightning.solver.cholesky import Factor, condition_bound, factorize, factorize_in_place
from pmet_lightning.solver.weight_delta import WeightDelta, factors_are_smaller

log = logging.getLogger(__name__)
BLOCK = 256  # rows of an I × I matrix worked on at a time
BLOCK_KEYS = 1024  # keys converted to float64 at a time
_SIGNS = 8  # random combinations of the outputs in the error estimate
_LARGE_ERROR = 1e-8  # relative, of the linear system


@dataclass(frozen=True)
class Solution:
    """An update and how well it solves its system.

    Attributes:
        delta: ΔW, float64.
        ridge: What was added to the diagonal to make the system positive definite (usually 0).
        solve_error: ‖ΔW·A − E·Kᵀ‖ / ‖E·Kᵀ‖ of the linear system as it was solved, estimated (to within about a
            quarter) from random combinations of the outputs.
        condition_bound: A lower bound on the condition number of the factorized matrix: λC + KKᵀ or, with a stored
            factor, the larger of the bounds for C and for the system of the edits.
    """

    delta: WeightDelta
    ridge: float
    solve_error: float
    condition_bound: float

    @property
    def delta_OI(self) -> Tensor:
        """ΔW as a matrix, float64, shape [O, I]."""
        return self.delta.dense()


def solve_update(residual_NO: Tensor, keys_NI: Tensor, moment_II: Tensor, lam: float) -> Solution:
    """ΔW = E Kᵀ (λ C + K Kᵀ)⁻¹ by a Cholesky factorization in float64.

    Beyond its inputs this takes I² + O·I float64 numbers and blocks.

    Args:
        residual_NO: This layer's share of the residual of each edit, shape [N, O].
        keys_NI: Keys, shape [N, I].
        moment_II: Second moment C of keys over general text, a mean over tokens, shape [I, I].
        lam: λ, in units of preserved keys.

    Raises:
        FloatingPointError: If an input or the result is not finite, or no small ridge makes the system
            positive definite.
    """
    _refuse_nan({"residual": residual_NO, "keys": keys_NI, "second moment": moment_II})
    lower_II, ridge = factorize(lambda: normal_matrix(keys_NI, moment_II, lam))
    delta = _apply_inverse(lower_II, residual_NO, keys_NI)
    preserved = partial(_preserved, moment_II=moment_II, lam=lam, ridge=ridge)
    solution = _checked(delta, ridge, residual_NO, keys_NI, preserved, condition_bound(lower_II))
    if solution.solve_error > _LARGE_ERROR:
        log.warning("the system is badly conditioned: solved only to a relative error of %.1e", solution.solve_error)
    return solution


def solve_sums(right_OI: Tensor, products_II: Tensor, moment_II: Tensor, lam: float) -> Solution:
    """The same ΔW from E Kᵀ and K Kᵀ, which can be summed over processes: less to send than the keys of many edits.

    Beyond its inputs this takes I² + O·I float64 numbers and blocks.

    Args:
        right_OI: E Kᵀ, float64, shape [O, I].
        products_II: K Kᵀ, float64, shape [I, I].
        moment_II: As for :func:`solve_update`.
        lam: λ.

    Raises:
        FloatingPointError: As :func:`solve_update`.
    """
    _refuse_nan({"residual": right_OI, "keys": products_II, "second moment": moment_II})
    lower_II, ridge = factorize(lambda: moment_II.to(torch.float64, copy=True).mul_(lam).add_(products_II))
    delta_OI = right_OI.clone(memory_format=torch.contiguous_format)
    _substitute(lower_II, delta_OI)
    _substitute(lower_II, delta_OI, transposed=True)
    signs_SO = _signs(len(right_OI), right_OI)
    x_SI, right_SI = signs_SO @ delta_OI, signs_SO @ right_OI
    error_SI = _preserved(x_SI, moment_II, lam, ridge) + x_SI @ products_II - right_SI
    return _with_error(WeightDelta(delta_OI), ridge, error_SI, right_SI, condition_bound(lower_II))


def multiply_transposed(left_NX: Tensor, keys_NI: Tensor) -> Tensor:
    """leftᵀ keys, float64, shape [X, I]: E Kᵀ of residuals, K Kᵀ of keys."""
    return _right_side(left_NX, keys_NI)


def solve_with_factor(residual_NO: Tensor, keys_NI: Tensor, factor: Factor, lam: float) -> Solution:
    """The same ΔW from a factor of C alone, which any number of edit batches and any λ can share.

    With C = L Lᵀ and Y = L⁻¹ K (Woodbury): ΔW = E (λ + YᵀY)⁻¹ Yᵀ L⁻¹. That is one N × N system, a triangular solve
    for N columns, and another for N columns or, where ΔW is not kept in factors, O: less work than
    :func:`solve_update` where N is well below I.

    Args:
        residual_NO: This layer's share of the residual of each edit, shape [N, O].
        keys_NI: Keys, shape [N, I].
        factor: Cholesky factor of the second moment.
        lam: λ, in units of preserved keys.

    Raises:
        FloatingPointError: If an input or the result is not finite, or C is too singular for this method (edits with
            keys where C is zero); :func:`solve_update` works then.
    """
    _refuse_nan({"residual": residual_NO, "keys": keys_NI})
    lower_II, residual = factor.lower_II, residual_NO.to(torch.float64)
    y_NI = keys_NI.to(torch.float64, copy=True)
    _substitute(lower_II, y_NI)
    small_NN = y_NI @ y_NI.T
    small_NN.diagonal().add_(lam)
    if not factorize_in_place(small_NN):
        raise FloatingPointError("the second moment is too singular for a solve with its factor")
    delta = _apply_small_inverse(lower_II, small_NN, residual, y_NI)
    ridge, bound = lam * factor.ridge, max(condition_bound(lower_II), condition_bound(small_NN))
    solution = _checked(delta, ridge, residual, keys_NI, lambda x_SI: lam * (x_SI @ lower_II @ lower_II.T), bound)
    if solution.solve_error > _LARGE_ERROR:
        raise FloatingPointError(
            f"the second moment is too singular for a solve with its factor (error {solution.solve_error:.1e})"
        )
    return solution


def _apply_inverse(lower_II: Tensor, residual_NO: Tensor, keys_NI: Tensor) -> WeightDelta:
    """E Kᵀ (L Lᵀ)⁻¹: as E and (L Lᵀ)⁻¹ K, or as a matrix, whichever is smaller."""
    if factors_are_smaller(len(keys_NI), residual_NO.shape[1], keys_NI.shape[1]):
        right_NI = keys_NI.to(torch.float64, copy=True)
        _substitute(lower_II, right_NI)
        _substitute(lower_II, right_NI, transposed=True)
        return WeightDelta(right_NI, residual_NO.to(torch.float64))
    delta_OI = _right_side(residual_NO, keys_NI)
    _substitute(lower_II, delta_OI)
    _substitute(lower_II, delta_OI, transposed=True)
    return WeightDelta(delta_OI)


def _apply_small_inverse(lower_II: Tensor, small_NN: Tensor, residual_NO: Tensor, y_NI: Tensor) -> WeightDelta:
    """E S⁻¹ Yᵀ L⁻¹ with the Cholesky factor of S: as E and the rest, or as a matrix; overwrites Y."""
    if factors_are_smaller(len(y_NI), residual_NO.shape[1], y_NI.shape[1]):
        _substitute(lower_II, y_NI, transposed=True)
        return WeightDelta(torch.cholesky_solve(y_NI, small_NN), residual_NO)
    weights_ON = residual_NO.T.clone(memory_format=torch.contiguous_format)
    _substitute(small_NN, weights_ON)
    _substitute(small_NN, weights_ON, transposed=True)
    delta_OI = weights_ON @ y_NI
    _substitute(lower_II, delta_OI, transposed=True)
    return WeightDelta(delta_OI)


def normal_matrix(keys_NI: Tensor, moment_II: Tensor, lam: float) -> Tensor:
    """λ C + K Kᵀ, float64, shape [I, I]; only the lower triangle, which is half the work."""
    system_II = moment_II.to(torch.float64, copy=True).mul_(lam)
    for keys in _in_float64(keys_NI):
        _add_products(system_II, keys, keys, lower_only=True)
    return system_II


def _right_side(residual_NO: Tensor, keys_NI: Tensor) -> Tensor:
    """E Kᵀ, float64, shape [O, I]."""
    right_OI = torch.zeros(residual_NO.shape[1], keys_NI.shape[1], dtype=torch.float64, device=keys_NI.device)
    for residual, keys in zip(_in_float64(residual_NO), _in_float64(keys_NI), strict=True):
        _add_products(right_OI, residual, keys)
    return right_OI


def _add_products(sum_XI: Tensor, left_NX: Tensor, keys_NI: Tensor, lower_only: bool = False) -> None:
    """Add leftᵀ keys, a block of rows at a time.

    ``addmm_`` would accumulate into the sum key by key, whereas a separate product is rounded at its own magnitude. For
    10,000 keys that has a tenth of the error.
    """
    for start in range(0, len(sum_XI), BLOCK):
        end = start + BLOCK
        width = end if lower_only else None
        sum_XI[start:end, :width] += left_NX[:, start:end].T @ keys_NI[:, :width]


def _in_float64(rows_NX: Tensor) -> Iterator[Tensor]:
    return (block.to(torch.float64) for block in rows_NX.split(BLOCK_KEYS))


def _substitute(lower_II: Tensor, rows_XI: Tensor, transposed: bool = False) -> None:
    """Replace every row x by L⁻¹ x, or L⁻ᵀ x, in place."""
    matrix_II, columns_IX = lower_II.T if transposed else lower_II, rows_XI.T
    torch.linalg.solve_triangular(matrix_II, columns_IX, upper=transposed, out=columns_IX)


def _checked(
    delta: WeightDelta,
    ridge: float,
    residual_NO: Tensor,
    keys_NI: Tensor,
    preserved: Callable[[Tensor], Tensor],
    bound: float,
) -> Solution:
    """The solution with its error, computed from the keys and C themselves, not from the system that was factorized.

    Args:
        delta: ΔW.
        ridge: As in :class:`Solution`.
        residual_NO: E.
        keys_NI: K.
        preserved: Multiplies rows by λ C + ridge.
        bound: As in :class:`Solution`.
    """
    signs_SO = _signs(residual_NO.shape[1], delta.right)
    x_SI = delta.times_rows(signs_SO)
    error_SI, right_SI = preserved(x_SI), torch.zeros_like(x_SI)
    for residual, keys in zip(_in_float64(residual_NO), _in_float64(keys_NI), strict=True):
        residual_SN = signs_SO @ residual.T
        error_SI += (x_SI @ keys.T - residual_SN) @ keys
        right_SI += residual_SN @ keys
    return _with_error(delta, ridge, error_SI, right_SI, bound)


def _signs(outputs: int, like: Tensor) -> Tensor:
    """Random combinations of the outputs, shape [S, O], always the same.

    The mean of ‖S (ΔW A − E Kᵀ)‖² over random signs is the number of combinations times ‖ΔW A − E Kᵀ‖²; checking all
    O outputs would cost more than the solve.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, (_SIGNS, outputs), generator=generator).to(like) * 2 - 1


def _preserved(x_SI: Tensor, moment_II: Tensor, lam: float, ridge: float) -> Tensor:
    """The rows multiplied by λ C + ridge, shape [S, I]."""
    product_SI = ridge * x_SI
    for rows_XI, columns_SX in zip(moment_II.split(BLOCK), product_SI.split(BLOCK, 1), strict=True):
        columns_SX += lam * (x_SI @ rows_XI.to(torch.float64).T)
    return product_SI


def _with_error(delta: WeightDelta, ridge: float, error_SI: Tensor, right_SI: Tensor, bound: float) -> Solution:
    """The solution, if it is finite, with ‖error‖ / ‖right-hand side‖ of the combinations."""
    error = float(error_SI.norm() / right_SI.norm().clamp_min(1e-300))
    if not math.isfinite(error) or not all(map(_finite, delta.tensors)):
        raise FloatingPointError("the update of the solve is not finite")
    return Solution(delta, ridge, error, bound)


def _refuse_nan(inputs: dict[str, Tensor]) -> None:
    for name, tensor in inputs.items():
        if not _finite(tensor):
            raise FloatingPointError(f"the {name} of the solve is not finite")


def _finite(tensor: Tensor) -> bool:
    """Whether all entries are finite; ``isfinite`` would make copies as large as the tensor."""
    return all(bool(end.isfinite()) for end in tensor.aminmax())

"""The closed-form update of one weight (METHOD.md, step 3): pure functions, float64.

Legend: N = edits, I = in-features (d_k), O = out-features (d).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pmet_lightning.architectures import SiteName

log = logging.getLogger(__name__)

SpreadRule = Literal["sqrt", "even"]
WriteChoice = Literal["ffn", "attn+ffn"]

# Ridges tried in turn, relative to the mean diagonal, when the system is not positive definite.
_RIDGES = (0.0, 1e-12, 1e-10, 1e-8, 1e-6)


@dataclass(frozen=True)
class Solution:
    """An update and how well it solves its system.

    Attributes:
        delta_OI: ΔW, float64, shape [O, I].
        ridge: What was added to the diagonal to make the system positive definite (0 as a rule).
        relative_error: ‖ΔW·A − E·Kᵀ‖ / ‖E·Kᵀ‖ of the linear system as it was solved.
    """

    delta_OI: Tensor
    ridge: float
    relative_error: float


def written_sites(write: WriteChoice) -> tuple[SiteName, ...]:
    """Sites whose weights are written, in the order of writing within a layer."""
    return ("ffn",) if write == "ffn" else ("attn", "ffn")


def share(layers_left: int, rule: SpreadRule) -> float:
    """Part of the residual that one layer takes on, ``layers_left`` counting itself (PMET: 1/√n)."""
    return 1 / math.sqrt(layers_left) if rule == "sqrt" else 1 / layers_left


def solve_update(residual_NO: Tensor, keys_NI: Tensor, moment_II: Tensor, lam: float) -> Solution:
    """ΔW = E Kᵀ (λ C + K Kᵀ)⁻¹ by a Cholesky factorisation in float64.

    Args:
        residual_NO: This layer's share of the residual of each edit, shape [N, O].
        keys_NI: Keys, shape [N, I].
        moment_II: Second moment C of keys over general text, a mean over tokens, shape [I, I].
        lam: λ, in units of preserved keys.

    Raises:
        FloatingPointError: If an input or the result is not finite, or no small ridge makes the system
            positive definite.
    """
    residual, keys, moment = (t.to(torch.float64) for t in (residual_NO, keys_NI, moment_II))
    for name, tensor in (("residual", residual), ("keys", keys), ("second moment", moment)):
        if not tensor.isfinite().all():
            raise FloatingPointError(f"the {name} of the solve is not finite")
    system_II = lam * moment + keys.T @ keys
    right_IO = keys.T @ residual
    factor, ridge = factorise(system_II)
    delta_IO = torch.cholesky_solve(right_IO, factor)
    if not delta_IO.isfinite().all():
        raise FloatingPointError("the update of the solve is not finite")
    error = (system_II @ delta_IO + ridge * delta_IO - right_IO).norm() / right_IO.norm().clamp_min(1e-300)
    return Solution(delta_IO.T.contiguous(), ridge, float(error))


def solve_with_factor(residual_NO: Tensor, keys_NI: Tensor, factor_II: Tensor, lam: float) -> Solution:
    """The same ΔW from a factor of C alone, which any number of edit batches and any λ can share.

    With C = L Lᵀ and Y = L⁻¹ K (Woodbury): ΔW = E (λ + YᵀY)⁻¹ Yᵀ L⁻¹, two triangular solves for N columns and one
    N × N system: less work than :func:`solve_update` where N is well below I.

    Args:
        residual_NO: This layer's share of the residual of each edit, shape [N, O].
        keys_NI: Keys, shape [N, I].
        factor_II: Lower Cholesky factor L of the second moment, float64, shape [I, I].
        lam: λ, in units of preserved keys.

    Raises:
        FloatingPointError: If an input or the result is not finite.
    """
    residual, keys = residual_NO.to(torch.float64), keys_NI.to(torch.float64)
    for name, tensor in (("residual", residual), ("keys", keys), ("factor", factor_II)):
        if not tensor.isfinite().all():
            raise FloatingPointError(f"the {name} of the solve is not finite")
    y_IN = torch.linalg.solve_triangular(factor_II, keys.T, upper=False)
    small_NN = y_IN.T @ y_IN
    small_NN.diagonal().add_(lam)
    weights_NO = torch.cholesky_solve(residual, torch.linalg.cholesky(small_NN))
    delta_IO = torch.linalg.solve_triangular(factor_II.T, y_IN @ weights_NO, upper=True)
    if not delta_IO.isfinite().all():
        raise FloatingPointError("the update of the solve is not finite")
    right_IO = keys.T @ residual
    left_IO = lam * (factor_II @ (factor_II.T @ delta_IO)) + keys.T @ (keys @ delta_IO)
    error = (left_IO - right_IO).norm() / right_IO.norm().clamp_min(1e-300)
    return Solution(delta_IO.T.contiguous(), 0.0, float(error))


def null_space(moment_II: Tensor, share: float) -> tuple[Tensor, float]:
    """Directions in which preserved keys hardly reach: eigenvectors of C, smallest eigenvalues first.

    Args:
        moment_II: C, shape [I, I].
        share: Most of the trace of C that they may hold together. (AlphaEdit takes the eigenvalues below a number,
            which has to be found anew for every model.)

    Returns:
        Orthonormal columns, float64, shape [I, R], and the mean of their eigenvalues.

    Raises:
        ValueError: If not one direction holds so little.
    """
    eigenvalues, vectors = torch.linalg.eigh(moment_II.to(torch.float64))
    held = eigenvalues.clamp_min(0).cumsum(0) / eigenvalues.clamp_min(0).sum()
    count = int((held <= share).sum())
    if count == 0:
        raise ValueError(
            f"no direction of the keys holds as little as {share:g} of the second moment (the first holds "
            f"{float(held[0]):.2g}); make --spread.null_space larger"
        )
    return vectors[:, :count], float(eigenvalues[:count].clamp_min(0).mean())


def solve_in_null_space(
    residual_NO: Tensor, keys_NI: Tensor, moment_II: Tensor, lam: float, share_of_trace: float
) -> Solution:
    """ΔW that leaves alone what preserved keys span (AlphaEdit): ΔW = E (K P)ᵀ (λ c P + (K P)ᵀ K P)⁻¹ P.

    P projects onto :func:`null_space`, and c is its mean eigenvalue, so that λ stays a number of preserved keys.

    Args:
        residual_NO: This layer's share of the residual of each edit, shape [N, O].
        keys_NI: Keys, shape [N, I].
        moment_II: Second moment C, shape [I, I].
        lam: λ.
        share_of_trace: As for :func:`null_space`.

    Raises:
        FloatingPointError: As :func:`solve_update`.
        ValueError: As :func:`null_space`.
    """
    basis_IR, mean = null_space(moment_II, share_of_trace)
    inside = torch.eye(basis_IR.shape[1], dtype=torch.float64, device=basis_IR.device) * mean
    solution = solve_update(residual_NO, keys_NI.to(torch.float64) @ basis_IR, inside, lam)
    return Solution(solution.delta_OI @ basis_IR.T, solution.ridge, solution.relative_error)


def factorise(system_II: Tensor) -> tuple[Tensor, float]:
    """Cholesky factor of a positive semidefinite matrix, with the smallest ridge that makes one possible.

    Args:
        system_II: C, or λC + KKᵀ, float64, shape [I, I].

    Returns:
        The lower factor, and the ridge.

    Raises:
        FloatingPointError: If no small ridge is enough.
    """
    scale = float(system_II.diagonal().mean())
    for relative in _RIDGES:
        ridge = relative * scale
        shifted = system_II + ridge * torch.eye(len(system_II), dtype=torch.float64, device=system_II.device)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed) == 0 and bool(factor.isfinite().all()):
            if ridge:
                log.warning("a singular system (dead key dimensions): factorised with a ridge of %.1e", ridge)
            return factor, ridge
    raise FloatingPointError(
        f"the system is not positive definite even with a ridge of {_RIDGES[-1]:g} of its mean diagonal; "
        "collect the second moments over more text"
    )

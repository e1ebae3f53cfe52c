"""The null space of C, and the update that stays inside it (AlphaEdit's projection).

Legend: N = edits, I = in-features (d_k), O = out-features (d), R = directions of the null space.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pmet_lightning.solver.update import Solution, solve_update


class NullSpace(NamedTuple):
    """Directions that hold hardly any of the preserved keys.

    Attributes:
        basis_IR: R orthonormal columns, float64, shape [I, R].
        mean: The mean of the eigenvalues of C along them.
    """

    basis_IR: Tensor
    mean: float

    def to(self, device: torch.device | str) -> NullSpace:
        """The same null space on a device."""
        return NullSpace(self.basis_IR.to(device), self.mean)


def null_space(moment_II: Tensor, share: float) -> NullSpace:
    """Directions that hold hardly any of the preserved keys: eigenvectors of C, smallest eigenvalues first.

    Args:
        moment_II: C, shape [I, I].
        share: Largest share of the trace of C that they may hold together. (AlphaEdit takes the eigenvalues below a
            threshold instead, which has to be found again for every model.)

    Raises:
        ValueError: If no direction holds so little.
    """
    eigenvalues, vectors = torch.linalg.eigh(moment_II.to(torch.float64))
    held = eigenvalues.clamp_min(0).cumsum(0) / eigenvalues.clamp_min(0).sum()
    count = int((held <= share).sum())
    if count == 0:
        raise ValueError(
            f"no direction of the keys holds as little as {share:g} of the second moment (the smallest holds "
            f"{float(held[0]):.2g}); make --spread.null_space larger"
        )
    return NullSpace(vectors[:, :count].clone(), float(eigenvalues[:count].clamp_min(0).mean()))


def solve_in_null_space(
    residual_NO: Tensor, keys_NI: Tensor, space: NullSpace, lam: float, besides_II: Tensor | None = None
) -> Solution:
    """ΔW that acts only in the null space of preserved keys (AlphaEdit): ΔW = E Kᵀ P (K_p K_pᵀ P + K Kᵀ P + λ c)⁻¹.

    P projects onto the null space of C alone, and c is its mean eigenvalue, so that λ stays a number of preserved
    keys. Keys K_p of earlier edit batches do not change P; their part in the null space counts as the new keys do
    (docs/method.md, 'The family').

    Args:
        residual_NO: This layer's share of the residual of each edit, shape [N, O].
        keys_NI: Keys, shape [N, I].
        space: Null space of C, on the device of the keys.
        lam: λ, in units of preserved keys.
        besides_II: K_p K_pᵀ, and what else is preserved besides C, float64, shape [I, I]; ``None`` if nothing is.

    Raises:
        FloatingPointError: As :func:`solve_update`.
    """
    basis_IR, mean = space
    inside_RR = torch.eye(basis_IR.shape[1], dtype=torch.float64, device=basis_IR.device) * mean
    if besides_II is not None:
        inside_RR += basis_IR.T @ (besides_II @ basis_IR) / lam  # in the units of C
    solution = solve_update(residual_NO, keys_NI.to(torch.float64) @ basis_IR, inside_RR, lam)
    return replace(solution, delta=replace(solution.delta, right=solution.delta.right @ basis_IR.T))

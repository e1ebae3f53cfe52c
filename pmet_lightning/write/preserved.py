"""What the write of one weight preserves, and the update that preserves it, for any λ.

Legend: N = edits of the edit batch, P = facts written before, O = out-features, I = in-features.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pmet_lightning.model.architectures import ProjectionId
from pmet_lightning.moments.second_moments import SecondMoments
from pmet_lightning.solver.null_space import solve_in_null_space
from pmet_lightning.solver.update import Solution, multiply_transposed, solve_sums, solve_update, solve_with_factor

log = logging.getLogger(__name__)

FEW_EDITS = 0.5  # of the key dimensions: up to here the solve with a stored factor is faster (benchmarks/solve.py)


@dataclass(frozen=True)
class Preserved:
    """General text, earlier edits and prompts: what one weight should do as before.

    Attributes:
        projection_id: The weight.
        second_moments: Where C comes from.
        device: The model's, on which the equation is solved.
        null_space: Share of C that the directions written to may hold; ``None`` writes to all.
        past_PI: Keys of facts written before, on any device; ``None`` protects none.
        rest_II: μRRᵀ of the tokens after the subject, float64, on the model's device; ``None`` preserves none.
    """

    projection_id: ProjectionId
    second_moments: SecondMoments
    device: torch.device
    null_space: float | None = None
    past_PI: Tensor | None = None
    rest_II: Tensor | None = None

    def besides(self) -> Tensor | None:
        """K_past K_pastᵀ + μRRᵀ, on the model's device, float64, shape [I, I], new; ``None`` if general text is all."""
        if self.past_PI is None:
            return None if self.rest_II is None else self.rest_II.clone()  # another λ may follow
        past_PI = self.past_PI.to(self.device)
        past_II = multiply_transposed(past_PI, past_PI)
        return past_II if self.rest_II is None else past_II.add_(self.rest_II)

    def total(self, lam: float) -> Tensor:
        """C plus, in its units, what is preserved besides general text; not to be changed in place."""
        moment_II = self.second_moments.moment(self.projection_id).to(self.device)
        besides_II = self.besides()
        return moment_II if besides_II is None else besides_II.div_(lam).add_(moment_II)

    def update(self, share_NO: Tensor, keys_NI: Tensor, lam: float) -> Solution:
        """ΔW that moves the values of keys by their shares of the residuals.

        Args:
            share_NO: This layer's share of the residuals, shape [N, O].
            keys_NI: Keys, shape [N, I].
            lam: λ, in preserved keys.

        Raises:
            FloatingPointError: If anything is not finite.
        """
        if self.null_space is not None:
            space = self.second_moments.null_space(self.projection_id, self.null_space)
            return solve_in_null_space(share_NO, keys_NI, space, lam, self.besides())
        count = len(keys_NI) + (0 if self.past_PI is None else len(self.past_PI))
        if count <= FEW_EDITS * keys_NI.shape[1] and self.rest_II is None:
            try:
                return self._update_with_factor(share_NO, keys_NI, lam)
            except FloatingPointError as error:
                log.info("%s: %s; solving without it", self.projection_id, error)
        return solve_update(share_NO, keys_NI, self.total(lam), lam)

    def _update_with_factor(self, share_NO: Tensor, keys_NI: Tensor, lam: float) -> Solution:
        """Earlier facts are edits that have nothing left to move: K_past joins K, with zeros as residuals."""
        factor = self.second_moments.factor(self.projection_id)
        if self.past_PI is None:
            return solve_with_factor(share_NO, keys_NI, factor, lam)
        past_PI = self.past_PI.to(keys_NI)
        zeros_PO = share_NO.new_zeros(len(past_PI), share_NO.shape[1])
        solution = solve_with_factor(torch.cat([zeros_PO, share_NO]), torch.cat([past_PI, keys_NI]), factor, lam)
        return replace(solution, delta=solution.delta.from_row(len(past_PI)))

    def update_from_sums(self, right_OI: Tensor, products_II: Tensor, lam: float) -> Solution:
        """The same from E Kᵀ and K Kᵀ, which several processes can add; not with a null space.

        Args:
            right_OI: E Kᵀ, float64, shape [O, I].
            products_II: K Kᵀ, float64, shape [I, I].
            lam: λ, in preserved keys.

        Raises:
            FloatingPointError: If anything is not finite.
        """
        return solve_sums(right_OI, products_II, self.total(lam), lam)

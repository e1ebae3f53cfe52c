"""How close an edit batch comes to its targets while its layers are written.

A write adds its share of the residual to the residual stream, and the shares add up: with 1/√n at each layer they are
more than the whole, so that the stream goes past its target, while a value inside the layer hardly changes with what
other layers have added.
Legend: N = edits of the edit batch, n = those of this process, F = width of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pmet_lightning.model.architectures import ProjectionId, SiteName
from pmet_lightning.utils.distributed import ProcessGroup

SpreadRule = Literal["sqrt", "even"]


def residual_share(layers_left: int, rule: SpreadRule) -> float:
    """Share of the residual that one layer takes; ``layers_left`` includes this layer (PMET: 1/√n)."""
    return 1 / math.sqrt(layers_left) if rule == "sqrt" else 1 / layers_left


@dataclass(frozen=True)
class SiteTarget:
    """V*, the values that a written site should have, shape [N, O], and the norm between site and residual stream."""

    projection_id: ProjectionId
    value_NO: Tensor
    norm: nn.Module | None

    def residual(self, values_NO: Tensor) -> Tensor:
        """The residual of values, measured in the residual stream: V* − value, or norm(V*) − norm(value)."""
        goal_NO = self.value_NO.to(values_NO.dtype)
        return goal_NO - values_NO if self.norm is None else self.norm(goal_NO) - self.norm(values_NO)


def mean_of_moving(values_N: Tensor) -> float:
    """The mean over the edits that have a residual, which are not NaN; 0 where all began at their targets."""
    return float(values_N.nanmean().nan_to_num(0.0))


CONVERGED_TOLERANCE = 0.01  # relative to the target's norm: below it an edit is at its target already, up to rounding


def overshoot(start_NF: Tensor, now_NF: Tensor, wanted_NF: Tensor) -> Tensor:
    """How far the residual stream of each edit has gone past its target: ⟨h − h₀, E₀⟩ / ‖E₀‖² − 1.

    Args:
        start_NF: h₀, what left the target layer before the first write, shape [N, F].
        now_NF: h, what leaves it now, shape [N, F].
        wanted_NF: E₀, the residual before the first write, shape [N, F].

    Returns:
        Shape [N]: −1 where nothing has moved, 0 at the target, positive beyond it; NaN without a residual.
    """
    moved_NF = (now_NF - start_NF).to(wanted_NF.dtype)
    return (moved_NF * wanted_NF).sum(dim=-1) / wanted_NF.square().sum(dim=-1) - 1


class ResidualTracker:
    """Measures how far an edit batch has come since before its first write, over all processes.

    Args:
        residual_of: For each written site, the residual of given values (:meth:`SiteTarget.residual`).
        values: Values of each site before the first write, shape [n, F] each.
        stream_nF: What left the target layer at that time, shape [n, F].
        processes: The processes of the run.
        count: N.

    Attributes:
        overshoots: Means over all edits, one for each :meth:`record_overshoot`.
    """

    def __init__(
        self,
        residual_of: Mapping[SiteName, Callable[[Tensor], Tensor]],
        values: Sequence[Tensor],
        stream_nF: Tensor,
        processes: ProcessGroup,
        count: int,
    ) -> None:
        self._residual_of, self._stream_nF, self._processes, self._count = residual_of, stream_nF, processes, count
        first = [
            _mask_converged(of(value_nF), of(torch.zeros_like(value_nF)))
            for of, value_nF in zip(residual_of.values(), values, strict=True)
        ]
        self._first_residual_nF = torch.stack(first).nansum(dim=0)
        self._first_norms = {site: self._norms(start_nF) for site, start_nF in zip(residual_of, first, strict=True)}
        self.overshoots: list[float] = []

    def left(self, site: SiteName, values_nF: Tensor) -> Tensor:
        """Norms of all residuals relative to the first ones, shape [N]; NaN for an edit that began at its target."""
        return self._norms(self._residual_of[site](values_nF)) / self._first_norms[site]

    def record_overshoot(self, stream_nF: Tensor) -> None:
        """Add the mean overshoot of the stream as it is now."""
        overshoot_n = overshoot(self._stream_nF, stream_nF, self._first_residual_nF)
        self.overshoots.append(mean_of_moving(self._processes.all_gather(overshoot_n, self._count)))

    def _norms(self, residual_nF: Tensor) -> Tensor:
        return self._processes.all_gather(residual_nF.norm(dim=-1), self._count)


def _mask_converged(residual_nF: Tensor, target_nF: Tensor) -> Tensor:
    """Residuals, with NaN for edits that are at their targets already."""
    converged_n = residual_nF.norm(dim=-1) < CONVERGED_TOLERANCE * target_nF.norm(dim=-1)
    return residual_nF.masked_fill(converged_n.unsqueeze(-1), torch.nan)

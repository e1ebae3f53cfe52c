"""Edits in active: where their deltas are, the rows that are run for them, and what is started of each.

Legend: A = edits in active, P = rows of an edit, R = A·P, K = target tokens, V = vocabulary, F = model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.model.architectures import SiteName
from pmet_lightning.targets.row_cache import RowSet


class DeltaSlots:
    """A index for each edit in active: one trainable delta for every site.

    Each delta is a parameter of its own, so that an optimizer counts its steps alone; they are rows of one tensor for
    every site, so that all are read and projected at once.

    Attributes:
        values: Shape [slots, F] for each site.
        parameters: Their rows.
    """

    def __init__(self, sites: Sequence[SiteName], count: int, width: int, dtype: torch.dtype, device: torch.device):
        self.values = {site: torch.zeros(count, width, dtype=dtype, device=device) for site in sites}
        self.parameters = {site: [nn.Parameter(row) for row in value] for site, value in self.values.items()}
        self._gradients = {site: torch.zeros_like(value) for site, value in self.values.items()}

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def open(self, slots: Sequence[int], state: Any) -> None:
        """Begin with zero, and without an optimizer's memory of who was there before."""
        for site, parameters in self.parameters.items():
            self.values[site][list(slots)] = 0
            for slot in slots:
                state.pop(parameters[slot], None)
                parameters[slot].grad = self._gradients[site][slot]

    def close(self, slots: Sequence[int]) -> None:
        """An optimizer passes over what has no gradient."""
        for parameters in self.parameters.values():
            for slot in slots:
                parameters[slot].grad = None

    def leaves(self, slots: Tensor) -> dict[SiteName, Tensor]:
        """Copies of some deltas that a gradient can be taken for, shape [A, F]."""
        return {site: value[slots].requires_grad_() for site, value in self.values.items()}

    def set_gradients(self, slots: Tensor, gradients: Sequence[Tensor]) -> None:
        """Hand gradients of shape [A, F] to the parameters."""
        for gradient, own in zip(gradients, self._gradients.values(), strict=True):
            own[slots] = gradient


@dataclass
class ActiveBatch:
    """The edits that are optimized together at present, one behind the other in every field.

    Attributes:
        edit_ids: Which edits.
        slots: Where their deltas are, int64, shape [A].
        step_counts: Steps each has taken.
        facts: Rows of their prompts: the bare one and the contexts.
        meanings: Rows of their KL prompts; ``None`` if the divergence has no weight.
        running: Whether an edit goes on, bool, shape [A].
        reason: Why it does not, a number of the loop's, shape [A].
        nll_factor: Its weight of the likelihood now, shape [A].
        clean: Each site's output without deltas in the bare row, shape [A, F]; of new ones after their first step.
        clean_kl: Log-probabilities at the KL prompt without deltas, shape [A, V]; likewise.
        final: v* as it stands, or stood when the edit stopped, shape [A, F].
        final_norm: Norm of the delta then, relative to the clean output, shape [A].
        step_log: What each step since the last look has brought: the parts of the loss and whether it counts, shape
            [A, parts + 1].
    """

    edit_ids: list[int]
    slots: Tensor
    step_counts: list[int]
    facts: RowSet
    meanings: RowSet | None
    running: Tensor
    reason: Tensor
    nll_factor: Tensor
    clean: dict[SiteName, Tensor] = field(default_factory=dict)
    clean_kl: Tensor | None = None
    final: dict[SiteName, Tensor] = field(default_factory=dict)
    final_norm: dict[SiteName, Tensor] = field(default_factory=dict)
    step_log: list[Tensor] = field(default_factory=list)

    @property
    def started(self) -> int:
        """How many edits have taken a step: the first ones."""
        return len(next(iter(self.clean.values()))) if self.clean else 0

    def join(self, other: ActiveBatch) -> None:
        """Let others in behind these; what they learn in their first step is added after it."""
        self.edit_ids += other.edit_ids
        self.step_counts += other.step_counts
        self.facts.join(other.facts)
        if self.meanings is not None and other.meanings is not None:
            self.meanings.join(other.meanings)
        for name in ("slots", "running", "reason", "nll_factor"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))

    def keep(self, indices: Sequence[int]) -> None:
        """Let all others leave."""
        index = torch.tensor(indices, dtype=torch.long, device=self.slots.device)
        self.facts.keep(index)
        if self.meanings is not None:
            self.meanings.keep(index)
        self.edit_ids, self.step_counts = ([values[i] for i in indices] for values in (self.edit_ids, self.step_counts))
        for name in ("slots", "running", "reason", "nll_factor"):
            setattr(self, name, getattr(self, name)[index])
        if self.clean_kl is not None:
            self.clean_kl = self.clean_kl[index]
        for values in (self.clean, self.final, self.final_norm):
            values.update({site: value[index] for site, value in values.items()})

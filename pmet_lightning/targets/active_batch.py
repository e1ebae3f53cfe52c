"""The active batch: the deltas of the edits that are optimized together, their rows, and what is recorded of each.

This is continuous batching: an edit leaves as soon as it has stopped, and a waiting edit takes its slot.
Legend: A = active edits, P = rows of an edit, R = A·P, K = target tokens, V = vocabulary, F = model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.model.architectures import SiteName
from pmet_lightning.targets.row_cache import RowSet

_PER_EDIT = ("slots", "running", "reason", "nll_factor", "helped")  # what an active batch has from the start


class DeltaSlots:
    """A slot for each active edit: one trainable delta for every site.

    Each delta is a parameter of its own, so that the optimizer counts its steps separately. The deltas of a site are
    rows of one tensor, so that all of them are read and projected at once.

    Attributes:
        values: The deltas of each site, shape [slots, F].
        parameters: Their rows, which share memory with ``values``.
    """

    def __init__(self, sites: Sequence[SiteName], count: int, width: int, dtype: torch.dtype, device: torch.device):
        self.values = {site: torch.zeros(count, width, dtype=dtype, device=device) for site in sites}
        self.parameters = {site: [nn.Parameter(row) for row in value] for site, value in self.values.items()}
        self._gradients = {site: torch.zeros_like(value) for site, value in self.values.items()}

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def open(self, slots: Sequence[int], state: Any) -> None:
        """Set the deltas to zero and drop what the optimizer keeps of the edits that had the slots before."""
        for site, parameters in self.parameters.items():
            self.values[site][list(slots)] = 0
            for slot in slots:
                state.pop(parameters[slot], None)
                parameters[slot].grad = self._gradients[site][slot]

    def close(self, slots: Sequence[int]) -> None:
        """Remove the gradients, so that the optimizer skips these slots."""
        for parameters in self.parameters.values():
            for slot in slots:
                parameters[slot].grad = None

    def leaves(self, slots: Tensor) -> dict[SiteName, Tensor]:
        """Copies of the deltas in some slots, to differentiate with respect to; shape [A, F] for each site."""
        return {site: value[slots].requires_grad_() for site, value in self.values.items()}

    def set_gradients(self, slots: Tensor, gradients: Sequence[Tensor]) -> None:
        """Store gradients of shape [A, F], one for each site, as those of the parameters."""
        for gradient, buffer in zip(gradients, self._gradients.values(), strict=True):
            buffer[slots] = gradient


@dataclass
class ActiveBatch:
    """The edits that are optimized together at present, in the same order in every field.

    Attributes:
        edit_ids: Index of each edit among those to optimize.
        slots: Slot of each edit's deltas, int64, shape [A].
        step_counts: Number of steps that each edit has taken.
        facts: Rows of their prompts: the bare one and the contexts.
        meanings: Rows of their KL prompts; ``None`` if the divergence has no weight.
        running: Whether an edit is still optimized, bool, shape [A].
        reason: Why it is not, as the loop numbers its stop reasons (0 while it is), int64, shape [A].
        nll_factor: Current weight of its negative log-likelihood, shape [A].
        helped: Whether the attention's delta is still in place, bool, shape [A].
        groups: Number of the group of equal keys of each edit, from 0, int64, shape [A]; ``None`` if all are alone.
        clean: Each site's output without deltas in the bare row, shape [A, F]; new edits follow after their first step.
        clean_kl: Log-probabilities at the KL prompt without deltas, shape [A, V]; likewise.
        final: v* at the current step, or at the step at which the edit stopped, shape [A, F].
        final_delta: The delta at that step, shape [A, F].
        final_norm: Its norm, relative to the clean output, shape [A].
        handed_over: Whether the attention's delta is taken away at this step, bool, shape [A].
        step_log: For each step since the last synchronization with the host, the parts of the loss and whether the
            step counts, shape [A, parts + 1].
    """

    edit_ids: list[int]
    slots: Tensor
    step_counts: list[int]
    facts: RowSet
    meanings: RowSet | None
    running: Tensor
    reason: Tensor
    nll_factor: Tensor
    helped: Tensor
    groups: Tensor | None = None
    clean: dict[SiteName, Tensor] = field(default_factory=dict)
    clean_kl: Tensor | None = None
    final: dict[SiteName, Tensor] = field(default_factory=dict)
    final_delta: dict[SiteName, Tensor] = field(default_factory=dict)
    final_norm: dict[SiteName, Tensor] = field(default_factory=dict)
    handed_over: Tensor | None = None
    step_log: list[Tensor] = field(default_factory=list)

    @property
    def started(self) -> int:
        """Number of edits that have taken a step; they come first."""
        return len(next(iter(self.clean.values()))) if self.clean else 0

    def join(self, other: ActiveBatch) -> None:
        """Append other edits; what their first step shows is appended after that step."""
        self.edit_ids += other.edit_ids
        self.step_counts += other.step_counts
        self.facts.join(other.facts)
        if self.meanings is not None and other.meanings is not None:
            self.meanings.join(other.meanings)
        for name in _PER_EDIT:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all edits but those at these indices."""
        index = torch.tensor(indices, dtype=torch.long, device=self.slots.device)
        self.facts.keep(index)
        if self.meanings is not None:
            self.meanings.keep(index)
        self.edit_ids, self.step_counts = ([values[i] for i in indices] for values in (self.edit_ids, self.step_counts))
        for name in _PER_EDIT:
            setattr(self, name, getattr(self, name)[index])
        if self.clean_kl is not None:
            self.clean_kl = self.clean_kl[index]
        for values in (self.clean, self.final, self.final_delta, self.final_norm):
            values.update({site: value[index] for site, value in values.items()})

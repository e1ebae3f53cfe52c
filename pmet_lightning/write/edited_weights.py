"""The weights that edit batches are written into: the total ΔW, the facts in it, the keys to protect, and rollback.

Legend: O = out-features, I = in-features (d_k).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.model.architectures import ProjectionId, SiteName
from pmet_lightning.model.fsdp import is_finite, local_rows, weight_norm
from pmet_lightning.solver.weight_delta import WeightDelta, total
from pmet_lightning.write.facts import WrittenFact, with_outcomes


@dataclass(frozen=True)
class Snapshot:
    """A state to return to: each weight with a copy of this process's rows, and the ΔW and protected keys of that time.

    An edit batch makes new tensors and leaves the old ones unchanged, so ΔW and keys need not be copied.
    """

    weights: list[tuple[Tensor, Tensor]]
    deltas: dict[str, WeightDelta]
    past_keys: dict[ProjectionId, Tensor]
    facts: tuple[WrittenFact, ...]


@dataclass
class Draft:
    """What an edit batch has changed so far; it takes effect once the whole batch is written.

    Attributes:
        deltas: Total ΔW of the weights written so far, earlier edit batches included.
        past_keys: Keys of the projections written so far, those of this edit batch last.
        facts: All facts, those of this edit batch last.
    """

    deltas: dict[str, WeightDelta] = field(default_factory=dict)
    past_keys: dict[ProjectionId, Tensor] = field(default_factory=dict)
    facts: tuple[WrittenFact, ...] = ()


class EditedWeights:
    """ΔW, protected keys and norms of the written weights over all edit batches.

    Args:
        sites: Written sites.

    Attributes:
        deltas: Total ΔW of every written weight by its name, on the CPU.
        facts: The facts in it, in the order of writing, without those that a later edit batch corrected.
        past_keys: Keys of each written projection, if they are to be protected: a row for each of the facts, shape
            [N, I], on the CPU of the first process.
        base_norms: ‖W‖ of every weight before the first edit.
        keep_previous: Whether the state before the last edit batch is kept for :meth:`undo`.
        previous: That state.
    """

    def __init__(self, sites: Sequence[SiteName]) -> None:
        self.sites = tuple(sites)
        self.deltas: dict[str, WeightDelta] = {}
        self.past_keys: dict[ProjectionId, Tensor] = {}
        self.facts: tuple[WrittenFact, ...] = ()
        self.base_norms: dict[str, float] = {}
        self.keep_previous = False
        self.previous: Snapshot | None = None

    def record_base_norms(self, module: EditableModel) -> None:
        """Record the norms of the unedited weights, against which their growth is measured."""
        for projection_id, weight in self._weights(module).items():
            name = module.sites.weight_name(*projection_id)
            self.base_norms[name] = weight_norm(weight, torch.promote_types(weight.dtype, torch.float32))

    def growth(self, name: str, delta: WeightDelta) -> float:
        """Norm of the total ΔW of all edit batches, relative to the norm of the unedited weight."""
        return delta.norm() / self.base_norms[name]

    def total_with(self, name: str, delta: WeightDelta) -> WeightDelta:
        """The total ΔW of a weight, with that of one more edit batch; on the CPU."""
        earlier = [self.deltas[name]] if name in self.deltas else []
        return total([*earlier, delta.to(torch.device("cpu"))])

    def resume(
        self, deltas: dict[str, WeightDelta], past_keys: dict[ProjectionId, Tensor], facts: Sequence[WrittenFact]
    ) -> None:
        """Take over what an earlier run has written."""
        self.deltas, self.past_keys, self.facts = dict(deltas), dict(past_keys), tuple(facts)

    def record_outcomes(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Keep what became of facts, by their ledger lines."""
        self.facts = with_outcomes(self.facts, lines)

    @contextmanager
    def transaction(self, projections: Sequence[nn.Module]) -> Iterator[Draft]:
        """Write all of an edit batch or nothing: if the block fails or is interrupted, all is restored bit for bit.

        Args:
            projections: The projections that are written.

        Raises:
            FloatingPointError: If a written weight is not finite.
        """
        self.previous = None  # freed first: it is as large as the copies made next
        weights: list[tuple[Tensor, Tensor]] = [(p.weight, local_rows(p.weight).clone()) for p in projections]  # type: ignore[arg-type,misc]
        draft = Draft()
        try:
            yield draft
            for weight, _ in weights:
                if not is_finite(weight):
                    raise FloatingPointError("a written weight is not finite in its own precision")
        except BaseException:
            _copy_back(weights)
            raise
        if self.keep_previous:
            self.previous = Snapshot(weights, self.deltas, self.past_keys, self.facts)
        self.deltas = self.deltas | draft.deltas
        self.past_keys, self.facts = self.past_keys | draft.past_keys, draft.facts

    def undo(self) -> None:
        """Take the last edit batch back, bit for bit; needs ``keep_previous``."""
        assert self.previous is not None, "keep_previous was not set"
        self.restore(self.previous)

    def snapshot(self, module: EditableModel) -> Snapshot:
        """The current state, with copies of the weights on the CPU."""
        weights = [(w, local_rows(w).to("cpu", copy=True)) for w in self._weights(module).values()]
        return Snapshot(weights, self.deltas, self.past_keys, self.facts)

    def restore(self, snapshot: Snapshot) -> None:
        """Return to the state of a snapshot, bit for bit."""
        _copy_back(snapshot.weights)
        self.resume(snapshot.deltas, snapshot.past_keys, snapshot.facts)
        self.previous = None

    def _weights(self, module: EditableModel) -> dict[ProjectionId, Tensor]:
        found = {}
        for projection_id in module.sites.written(self.sites, module.written_layers):
            weight = module.sites.module(*projection_id).weight
            assert isinstance(weight, Tensor)
            found[projection_id] = weight
        return found


@torch.no_grad()
def _copy_back(weights: Sequence[tuple[Tensor, Tensor]]) -> None:
    for weight, kept in weights:
        local_rows(weight).copy_(kept)

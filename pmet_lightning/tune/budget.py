"""How much a search may take, and what it tries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pmet_lightning.analysis.results import proposed_layers
from pmet_lightning.targets.construction import Construction
from pmet_lightning.targets.target_optimizer import OptimizedSites
from pmet_lightning.tune.space import CONSTRUCTIONS, OPTIMIZED, TargetSetting
from pmet_lightning.tune.study import REDUCTION

LEAST_RUNG = 12
LARGE_RUNG = 40  # edits from which on a third of all is enough to tell settings apart
# What layers are looked at with: targets that live at the FFN's output, and at the layer's.
PROBES = (TargetSetting(0, "ffn", 4.0), TargetSetting(0, "hidden", 1.0))


@dataclass(frozen=True)
class Budget:
    """How much a search may take.

    Attributes:
        seconds: Time in all; not looked at if ``trials`` is given.
        trials: Trials of the second stage.
        edits: Edits in an edit batch; ``None`` takes as many as the records and the time allow.
        optimize: What may get a delta.
        targets: Where the targets of the edited layers may come from.
        first: Layers that are looked at before all others.
    """

    seconds: float = 1800.0
    trials: int | None = None
    edits: int | None = None
    optimize: Sequence[OptimizedSites] = OPTIMIZED
    targets: Sequence[Construction] = CONSTRUCTIONS
    first: Sequence[int] = ()

    @classmethod
    def of(
        cls,
        minutes: float,
        trials: int | None = None,
        edits: int | None = None,
        optimize: Sequence[OptimizedSites] | None = None,
        targets: Sequence[Construction] | None = None,
        analysis: str | Path | None = None,
    ) -> Budget:
        """The budget of a command, where ``None`` tries all, with the layers that an analysis proposes first."""
        first = [] if analysis is None else proposed_layers(Path(analysis).expanduser())
        return cls(60 * minutes, trials, edits, optimize or OPTIMIZED, targets or CONSTRUCTIONS, first)

    @property
    def probes(self) -> list[TargetSetting]:
        """What layers are looked at with."""
        allowed = [one for one in PROBES if one.optimize in self.optimize] or [TargetSetting(0, self.optimize[0], 4.0)]
        return [replace(one, targets=self.targets[0]) for one in allowed]


def rungs_of(edits: int, whole: bool = True) -> list[int]:
    """Numbers of edits of a trial, each three times the one before.

    Args:
        edits: Edits in an edit batch.
        whole: Whether the last one is all of them; otherwise a third, if that is enough to tell settings apart.
    """
    rungs = [edits // REDUCTION**2, edits // REDUCTION, edits]
    if not whole and edits // REDUCTION >= LARGE_RUNG:
        rungs.pop()
    return [rung for rung in rungs if rung >= min(LEAST_RUNG, edits)]

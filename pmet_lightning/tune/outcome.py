"""What a setting does to some records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pmet_lightning.evaluation.probes import harmonic_mean
from pmet_lightning.evaluation.scores import CORE, NAMES, table_of


@dataclass(frozen=True)
class Outcome:
    """What one setting does.

    Attributes:
        rows: The score row of each edit, as :func:`~pmet_lightning.evaluation.scores.record_rows` makes them.
        scores: Its scores: percentages with their 95 % intervals.
        found: Mean P(o*) at the end of the search for targets: how far they are found at all.
        growth: Largest ‖ΔW‖ / ‖W‖ of a layer.
        seconds: Seconds for the ``targets``, the ``write`` and the ``questions``.
        before: Scores of the unedited model, where they were measured anew.
    """

    rows: Tensor
    scores: Mapping[str, float]
    found: float
    growth: float
    seconds: Mapping[str, float]
    before: Mapping[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The Score: the harmonic mean of efficacy, generalization and specificity, as far as they were asked."""
        return float(harmonic_mean(torch.tensor([self.scores[kind] for kind in CORE if kind in self.scores])))

    @property
    def damage(self) -> float:
        """KL divergence of the answers about neighbors from those of the unedited model; 0 without such questions."""
        return self.scores.get("specificity_kl", 0.0)


def join(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of several edit batches: their records together."""
    if len(outcomes) == 1:
        return outcomes[0]
    rows = torch.cat([outcome.rows for outcome in outcomes])
    rows[:, 0] = torch.arange(len(rows))
    count = len(rows)
    return Outcome(
        rows,
        {name: float(value) for name, value in table_of(rows).items()},
        sum(outcome.found * len(outcome.rows) for outcome in outcomes) / count,
        max(outcome.growth for outcome in outcomes),
        {name: sum(outcome.seconds[name] for outcome in outcomes) for name in outcomes[0].seconds},
    )


def packed(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON has it, with what its paired differences need of each record."""
    columns = [1 + NAMES.index(name) for name in CORE]
    rows = [[None if value != value else round(value, 4) for value in row] for row in outcome.rows[:, columns].tolist()]
    return {
        "rows": rows,
        "scores": dict(outcome.scores),
        "found": outcome.found,
        "growth": outcome.growth,
        "seconds": dict(outcome.seconds),
    }


def unpacked(plain: Mapping[str, Any]) -> Outcome:
    """What :func:`packed` has made; what it left out is NaN."""
    values = [[math.nan if value is None else value for value in row] for row in plain["rows"]]
    rows: Tensor = torch.full((len(values), 1 + len(NAMES)), math.nan, dtype=torch.float64)
    rows[:, 0] = torch.arange(len(values))
    rows[:, [1 + NAMES.index(name) for name in CORE]] = torch.tensor(values, dtype=torch.float64)
    return Outcome(rows, plain["scores"], plain["found"], plain["growth"], plain["seconds"])

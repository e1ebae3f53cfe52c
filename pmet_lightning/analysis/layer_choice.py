"""Which layers to edit, from causal tracing: those whose FFN, put back at the subject's last token, brings the answer.

Legend: N = facts, L = layers, B = resamples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from pmet_lightning.analysis.measures import interval, resampled_means

HALF = 0.5  # of the peak: a layer with so much of it belongs to the range


@dataclass(frozen=True)
class Proposal:
    """Layers to edit, and how sure that is.

    Attributes:
        layers: The layers around the peak that have at least half of its effect, without a gap; targets live in the
            last of them.
        peak: The layer with the largest effect.
        effect: Its effect, with its 95 % interval and the number of facts.
        lead: How much larger that is than the largest effect outside of the range, likewise; ``None`` if there is no
            layer outside.
        same_peak: Share of resamples of the facts that have the same peak.
        same_layers: Share of resamples that have the same range.
    """

    layers: list[int]
    peak: int
    effect: dict[str, float]
    lead: dict[str, float] | None
    same_peak: float
    same_layers: float

    @property
    def verdict(self) -> str:
        """How sure it is, in words."""
        if self.effect["low"] <= 0:
            return "no evidence: the effect at the peak does not differ from zero"
        for least, words in ((0.95, "sure"), (0.5, "likely")):
            if self.same_layers >= least:
                return words
        return "unsure: other facts of this kind would give other layers"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"verdict": self.verdict}


def around_peak(effect_L: Tensor) -> list[int]:
    """The peak's layer and its neighbours down to half of its effect, ascending."""
    peak = int(effect_L.argmax())
    enough = (effect_L >= HALF * effect_L[peak]).tolist() if effect_L[peak] > 0 else [False] * len(effect_L)
    first = last = peak
    while first > 0 and enough[first - 1]:
        first -= 1
    while last + 1 < len(enough) and enough[last + 1]:
        last += 1
    return list(range(first, last + 1))


def propose(effect_NL: Tensor) -> Proposal:
    """Propose layers.

    Args:
        effect_NL: Indirect effect of each layer's FFN at the subject's last token, for each fact.
    """
    mean_L = effect_NL.double().mean(dim=0)
    layers, peak = around_peak(mean_L), int(mean_L.argmax())
    means_BL = resampled_means(effect_NL)
    same_peak = float((means_BL.argmax(dim=1) == peak).double().mean())
    same = sum(around_peak(means_L) == layers for means_L in means_BL)
    outside = [layer for layer in range(len(mean_L)) if layer not in layers]
    lead = None
    if outside:
        second = max(outside, key=lambda layer: float(mean_L[layer]))
        lead = interval(effect_NL[:, peak] - effect_NL[:, second])
    return Proposal(layers, peak, interval(effect_NL[:, peak]), lead, same_peak, same / len(means_BL))

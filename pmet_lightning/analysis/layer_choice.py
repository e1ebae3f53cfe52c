"""Which layers to edit, from causal tracing at the subject's last token.

An edit has to be written where the FFN stores such facts, and before attention fetches them. The first is visible in
the effect of restoring the FFN's output in one layer, or in a few adjacent ones; the second in that of restoring the
residual stream: above the layers that fetch the fact, what the stream holds of it no longer has an effect. In a deep
model many layers can lie between; where their FFNs have next to no effect, they are not edited.
Legend: N = facts, L = layers, B = resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from pmet_lightning.analysis.measures import LEAST_FACTS, TOO_FEW, interval, resampled_means

HALF = 0.5  # share of the effect at the peak that every layer of the range up to the peak has at least
LEAST = 0.05  # the same for the FFNs above the peak
NO_EVIDENCE = "no evidence: the effect at the peak does not differ from zero"
SURE, LIKELY = "sure", "likely"
_SURE_FROM, _LIKELY_FROM = 0.95, 0.5  # shares of resamples


@dataclass(frozen=True)
class Proposal:
    """Layers to edit, and how sure that is.

    Attributes:
        layers: From the first layer around the FFN's peak that has half of the peak's effect, to the last one in which
            the residual stream still has half of its effect at the peak, and the FFN a twentieth of its own; targets
            live in the last of them.
        peak: The layer whose FFN has the largest effect.
        effect: Mean of that effect, its 95 % interval and the number of facts.
        lead: The same for its difference from the second largest effect; ``None`` if there is only one layer.
        same_peak: Share of resamples of the facts that have the same peak.
        same_layers: Share of resamples of the facts that have the same range.
        first: Smallest and largest first layer in the middle 95 % of the resamples.
        last: The same for the last layer.
    """

    layers: list[int]
    peak: int
    effect: dict[str, float]
    lead: dict[str, float] | None
    same_peak: float
    same_layers: float
    first: tuple[int, int]
    last: tuple[int, int]

    @property
    def verdict(self) -> str:
        """How sure it is that tracing other facts of this kind gives these layers, in words."""
        if self.effect["count"] < LEAST_FACTS:
            return TOO_FEW
        if self.effect["low"] <= 0:
            return NO_EVIDENCE
        if self.same_layers >= _SURE_FROM:
            return SURE
        return LIKELY if self.same_layers >= _LIKELY_FROM else "unsure: other facts would give other layers"

    def to_dict(self) -> dict[str, Any]:
        """As written to analysis.json."""
        return asdict(self) | {"verdict": self.verdict}


def layers_to_edit(ffn_L: Tensor, stream_L: Tensor) -> list[int]:
    """The range of a proposal.

    Args:
        ffn_L: Effect of each layer's FFN.
        stream_L: Effect of the residual stream after each layer.
    """
    first = last = peak = int(ffn_L.argmax())
    ffn, stream = ffn_L.tolist(), stream_L.tolist()
    while first > 0 and ffn[first - 1] >= HALF * ffn[peak] > 0:
        first -= 1
    while last + 1 < len(stream) and ffn[last + 1] >= LEAST * ffn[peak] and stream[last + 1] >= HALF * stream[peak] > 0:
        last += 1
    return list(range(first, last + 1))


def propose(ffn_NL: Tensor, stream_NL: Tensor) -> Proposal:
    """Propose layers.

    Args:
        ffn_NL: Indirect effect of each layer's FFN at the subject's last token, for each fact.
        stream_NL: The same for the residual stream.
    """
    mean_L, stream_L = ffn_NL.double().mean(dim=0), stream_NL.double().mean(dim=0)
    layers, peak = layers_to_edit(mean_L, stream_L), int(mean_L.argmax())
    means_BL, streams_BL = resampled_means(ffn_NL), resampled_means(stream_NL)  # the same facts in both
    same_peak = float((means_BL.argmax(dim=1) == peak).double().mean())
    resampled = [layers_to_edit(*pair) for pair in zip(means_BL, streams_BL, strict=True)]
    lead = None
    if len(mean_L) > 1:
        second = int(mean_L.argsort(descending=True)[1])
        lead = interval(ffn_NL[:, peak] - ffn_NL[:, second])
    return Proposal(
        layers,
        peak,
        interval(ffn_NL[:, peak]),
        lead,
        same_peak,
        resampled.count(layers) / len(resampled),
        _middle([own[0] for own in resampled]),
        _middle([own[-1] for own in resampled]),
    )


def _middle(layers: Sequence[int]) -> tuple[int, int]:
    """The ends of the middle 95 %."""
    cut, ordered = int(0.025 * len(layers)), sorted(layers)
    return ordered[cut], ordered[-1 - cut]

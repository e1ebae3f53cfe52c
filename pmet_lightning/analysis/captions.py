"""What the figures of an analysis show, in words: sentences made of the means that are drawn.

Legend: L = layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from pmet_lightning.analysis.components import ATTN, FFN, LAST, SUBJECT
from pmet_lightning.analysis.study import Findings
from pmet_lightning.analysis.tracing import LAST_TOKEN, SUBJECT_LAST

LEAST = 0.001  # of P(answer): less is not told as a number
READABLE = 0.5  # P(answer) from which on the answer can be read, as above every rival's


def captions(findings: Findings, opening: str = "Here") -> dict[str, str]:
    """A sentence or two for the figures ``effect``, ``tracing``, ``contribution`` and ``lens``.

    Args:
        findings: The findings of a phase.
        opening: The words that each begins with.
    """
    told = {"contribution": _contribution(findings), "lens": _lens(findings)}
    if "effect" in findings.measures:
        told |= {"effect": _effect(findings), "tracing": _tracing(findings)}
    return {name: f"{opening} {text}" for name, text in told.items()}


def _effect(findings: Findings) -> str:
    parts = []
    for component, place, where in (
        (FFN, SUBJECT_LAST, "at the subject's last token the FFN's effect"),
        (ATTN, LAST_TOKEN, "at the prompt's last token attention's"),
    ):
        means_L = _means(findings, "effect", component=component, place=place)
        peak = max(range(len(means_L)), key=means_L.__getitem__)
        parts.append(f"{where} is largest in layer {peak} ({means_L[peak]:.3f})")
    return f"{', '.join(parts)}."


def _tracing(findings: Findings) -> str:
    subject_L, last_L = (
        _means(findings, "effect", component="hidden", place=place) for place in (SUBJECT_LAST, LAST_TOKEN)
    )
    earlier = [layer for layer, (own, other) in enumerate(zip(subject_L, last_L, strict=True)) if own > other]
    first = earlier[-1] + 1 if earlier else 0
    if first == len(last_L):
        return "the residual stream has more effect at the subject's last token, up to the last layer."
    return f"the residual stream has more effect at the prompt's last token from layer {first} on."


def _contribution(findings: Findings) -> str:
    attention, ffn = (sum(_followed(findings, "contribution", LAST, component)) for component in (ATTN, FFN))
    return f"attention adds {attention:.1f} at the prompt's last token, all layers together, and the FFNs {ffn:.1f}."


def _lens(findings: Findings) -> str:
    last_L, subject_L = (_followed(findings, "lens", token) for token in (LAST, SUBJECT))
    readable = [layer for layer, value in enumerate(last_L) if value >= READABLE]
    if readable:
        text = f"it reaches one half at the prompt's last token in layer {readable[0]}"
    else:
        text = f"it stays below one half at the prompt's last token, at most {max(last_L):.3f}"
    most = f"below {LEAST}" if max(subject_L) < LEAST else f"{max(subject_L):.3f} at most"
    text += f"; at the subject's last token it is {most}."
    if max(subject_L) < READABLE:
        text += " What is stored at the subject is not the answer in a form that can be said."
    return text


def _means(findings: Findings, name: str, **labels: str) -> Sequence[float]:
    """Means over facts, by layer; 0 where no fact has a value."""
    means_L: list[float] = findings.measures[name].at(**labels).nanmean(dim=0).nan_to_num().tolist()
    return means_L


def _followed(findings: Findings, name: str, token: str, component: str | None = None) -> Sequence[float]:
    """Means over facts for the tracked answer, by layer."""
    labels = {"token": token} | ({} if component is None else {"component": component})
    means_L: list[float] = findings.of_followed(name, **labels).nanmean(dim=0).nan_to_num().tolist()
    return means_L

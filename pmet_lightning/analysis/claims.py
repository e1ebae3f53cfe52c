"""The paper's claim that attention extracts what the FFN stores, as predictions that can fail.

Each prediction is a difference for each fact, with its mean and 95 % bootstrap interval; the claim predicts that it is
above zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pmet_lightning.analysis.components import ATTN, FFN, LAST
from pmet_lightning.analysis.facts import NEW, TRUE
from pmet_lightning.analysis.measures import LEAST_FACTS, TOO_FEW, Measure, interval
from pmet_lightning.analysis.study import Findings
from pmet_lightning.analysis.tracing import LAST_TOKEN, SUBJECT_LAST

SHOWN, REFUTED = "shown", "refuted"


@dataclass(frozen=True)
class Claim:
    """One prediction and its result.

    Attributes:
        text: The prediction.
        phase: ``before`` or ``after`` an edit, or ``after - before``.
        found: Mean difference, its 95 % interval and the number of facts.
    """

    text: str
    phase: str
    found: dict[str, float]

    @property
    def verdict(self) -> str:
        """``shown``, ``not shown``, ``refuted`` (the opposite is shown), or that there are too few facts to say."""
        if self.found["count"] < LEAST_FACTS:
            return TOO_FEW
        if self.found["low"] > 0:
            return SHOWN
        return REFUTED if self.found["high"] < 0 else "not shown"

    def to_dict(self) -> dict[str, Any]:
        """As written to analysis.json."""
        return {"text": self.text, "phase": self.phase, **self.found, "verdict": self.verdict}


def claims_of(before: Findings, after: Findings | None) -> list[Claim]:
    """The predictions and their results before an edit and, if there was one, after it.

    Args:
        before: Findings on the unedited model.
        after: Findings on the edited model, for the same facts; ``None`` without an edit.
    """
    claims = []
    for findings in (before, after):
        if findings is not None:
            claims += _phase_claims(findings)
    return claims if after is None else claims + _edit_claims(before, after)


def conclusion(claims: Sequence[Claim], phase: str) -> str:
    """Whether the claim as a whole is shown in one phase, in words.

    Args:
        claims: As returned by :func:`claims_of`.
        phase: ``before`` or ``after`` an edit.

    Returns:
        ``shown`` if all predictions are, ``refuted`` if one is, else ``not shown``; and how many are what.
    """
    verdicts = [claim.verdict for claim in claims if claim.phase == phase]
    if TOO_FEW in verdicts:
        return TOO_FEW
    shown, refuted = verdicts.count(SHOWN), verdicts.count(REFUTED)
    verdict = SHOWN if shown == len(verdicts) else REFUTED if refuted else "not shown"
    details = f"{shown} of {len(verdicts)} predictions shown" + (f", {refuted} refuted" if refuted else "")
    return f"{verdict} ({details})"


def _edit_claims(before: Findings, after: Findings) -> list[Claim]:
    """Predictions about what an edit changes, where records have both answers."""
    shift = _towards_new(after.measures) - _towards_new(before.measures)
    if shift.isnan().all():
        return []
    named = "after - before"
    return [
        Claim("the edit turns attention's outputs at the prompt's last token to the new answer (logit less the true "
              "one's, sum over layers)", named, interval(shift[:, 0])),
        Claim("it turns attention's outputs there more than the FFN's", named, interval(shift[:, 0] - shift[:, 1])),
    ]  # fmt: skip


def _phase_claims(findings: Findings) -> list[Claim]:
    """Predictions about one phase."""
    claims = []
    if "effect" in findings.measures:
        stored = _effect(findings.measures["effect"], FFN, ATTN, SUBJECT_LAST)
        extracted = _effect(findings.measures["effect"], ATTN, FFN, LAST_TOKEN)
        claims.append(
            Claim("the FFN's effect at the subject's last token exceeds attention's (mean over layers)",
                  findings.phase, interval(stored))
        )  # fmt: skip
        if not extracted.isnan().all():
            claims.append(
                Claim("attention's effect at the prompt's last token exceeds the FFN's (mean over layers)",
                      findings.phase, interval(extracted))
            )  # fmt: skip
    sums = findings.of_followed("contribution", token=LAST).sum(dim=1)
    claims.append(
        Claim("attention adds more to the answer's logit at the prompt's last token than the FFN (sum over layers)",
              findings.phase, interval(sums[:, 0] - sums[:, 1]))
    )  # fmt: skip
    return claims


def _effect(effect: Measure, more: str, less: str, position: str) -> Tensor:
    difference = effect.at(component=more, place=position) - effect.at(component=less, place=position)
    return difference.mean(dim=1)


def _towards_new(measures: Mapping[str, Measure]) -> Tensor:
    """What attention and FFN add to the new answer's logit beyond the true one's, shape [N, 2]."""
    added = measures["contribution"]
    return (added.at(token=LAST, answer=NEW) - added.at(token=LAST, answer=TRUE)).sum(dim=1)

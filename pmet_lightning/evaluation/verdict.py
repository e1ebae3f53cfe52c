"""What a run has come to: which facts the model says by itself, why not the others, and whether it is damaged.

Pure functions of ledger lines, generated answers and scores; the thresholds are here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pmet_lightning.evaluation.generation import says

# A probability above one half is above every rival's, so that greedy decoding takes it: P(o*) at the end of the
# optimization tells that a target vector was found, P(o*) after the write that the weights hold it.
LIKELY = 0.5
# Factors of the perplexity of unrelated text. On real models an edit that shows in scores of other tasks moves it by a
# few percent; from a half more on, texts get visibly worse; at three times as much each token costs 1.6 bits more, and
# generated text is no longer text.
WARN_FROM, DAMAGED_FROM = 1.5, 3.0

Cause = Literal["not_found", "not_written", "same_subject", "overwritten", "other_words", "unknown"]
# What is the matter, and what to do about it.
CAUSES: dict[Cause, tuple[str, str]] = {
    "not_found": (
        "no target vector found: P(new object) was still low after the last step",
        "more --model.steps, a larger --model.clamp or learning rate, or other --model.layers",
    ),
    "not_written": (
        "found, but the weights did not take it",
        "a smaller --spread.lam (where --spread.max_change sets λ: a larger one), fewer edits in a batch "
        "(--data.edit_batch), or more --model.layers",
    ),
    "same_subject": (
        "in one batch with another edit of the same subject, whose key it shares",
        "write one of them later (--data.edit_batch 1), or keep the one that matters",
    ),
    "overwritten": (
        "said right after its edit batch, undone by a later edit",
        "larger edit batches, and no --spread.protect_past false; of two facts about one subject the later one wins",
    ),
    "other_words": (
        "the new object is likely, but the model begins with other words",
        "a prompt that goes on with the object, the object in the form that fits, or more --model.free_tokens",
    ),
    "unknown": ("no target vector was optimized, so that the cause is not known", ""),
}
DamageLevel = Literal["not measured", "none", "warning", "damaged"]


@dataclass(frozen=True)
class Outcome:
    """How one edit ended.

    Attributes:
        answer: What the model says to the bare edit prompt: at the end, or right after its edit batch if it was not
            asked again.
        cause: Why that is not the new object; ``None`` if it is.
    """

    answer: str
    cause: Cause | None

    @property
    def said(self) -> bool:
        """Whether the model says the new object."""
        return self.cause is None


@dataclass(frozen=True)
class Damage:
    """What the edits did to unrelated text.

    Attributes:
        level: From its thresholds; ``not measured`` without a text.
        factor: Perplexity relative to that of the unedited model; ``None`` if not measured.
        kl: KL(unedited ‖ edited) of the next token in nats; ``None`` if not measured.
    """

    level: DamageLevel
    factor: float | None = None
    kl: float | None = None

    def __str__(self) -> str:
        factor = [] if self.factor is None else [f"perplexity of unrelated text × {self.factor:.3g}"]
        return ", ".join([*factor, *([] if self.kl is None else [f"KL {self.kl:.3g} nats"])])


@dataclass(frozen=True)
class Verdict:
    """What a run has come to.

    Attributes:
        facts: Number of edits that were judged.
        said: Number of those that the model says by itself.
        causes: Number of the others by cause, the most frequent first.
        damage: What became of other text.
        at_the_end: Whether all were asked after the last edit batch, and not each right after its own.
        undone: Facts of earlier calls or edit batches that were said and are not any more; they are not in ``facts``.
    """

    facts: int
    said: int
    causes: Mapping[Cause, int]
    damage: Damage
    at_the_end: bool = True
    undone: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        damage = {"perplexity_factor": self.damage.factor, "kl": self.damage.kl}
        return {
            "facts": self.facts,
            "said": self.said,
            "not_said": dict(self.causes),
            "asked": "at the end" if self.at_the_end else "right after the edit batch",
            "damage": self.damage.level,
            **{name: None if value is None or not math.isfinite(value) else value for name, value in damage.items()},
            **({"undone": list(self.undone)} if self.undone else {}),
        }


def outcomes(lines: Sequence[Mapping[str, Any]], asked: Mapping[int, tuple[str, bool]]) -> list[Outcome]:
    """How each edit ended.

    Args:
        lines: A line for each edit: its ledger line, or for a method without one at least its subject.
        asked: What was said at the end, by position of the line: the answer, and whether the new object is in it.
    """
    shared = _shared_keys(lines)
    found = []
    for position, line in enumerate(lines):
        answer, said = asked.get(position, (str(line.get("answer", "")), said_at_once(line)))
        found.append(Outcome(answer, None if said else _cause(line, position in asked, position in shared)))
    return found


def to_ask_again(lines: Sequence[Mapping[str, Any]], asked: Collection[int]) -> list[int]:
    """Positions of edits that a later edit batch may have undone: said, of a subject that it has an edit of.

    Args:
        lines: Ledger lines in order.
        asked: Positions whose answer at the end is known.
    """
    last = {line["subject"]: line["edit_batch"] for line in lines}
    return [
        position
        for position, line in enumerate(lines)
        if position not in asked and last[line["subject"]] > line["edit_batch"] and said_at_once(line)
    ]


def said_at_once(line: Mapping[str, Any]) -> bool:
    """Whether the model said the new object right after the edit batch of a ledger line."""
    return bool(line["said"] if "said" in line else says(line.get("answer", ""), line.get("target", "")))


def judge(ended: Sequence[Outcome], damage: Damage, at_the_end: bool = True, undone: Iterable[str] = ()) -> Verdict:
    """The verdict over all edits.

    Args:
        ended: As :func:`outcomes` gives them.
        damage: As :func:`damage_of` gives it.
        at_the_end: Whether all were asked after the last edit batch.
        undone: Questions of earlier facts that are no longer answered.
    """
    counts = {cause: sum(outcome.cause == cause for outcome in ended) for cause in CAUSES}
    causes = {cause: count for cause, count in sorted(counts.items(), key=lambda item: -item[1]) if count}
    return Verdict(len(ended), sum(o.said for o in ended), causes, damage, at_the_end, tuple(undone))


def damage_of(
    scores: Mapping[str, Mapping[str, float]],
    warn_from: float = WARN_FROM,
    damaged_from: float = DAMAGED_FROM,
    last_factor: float | None = None,
) -> Damage:
    """What the edits did to unrelated text, from its perplexity and KL.

    e^KL is on the scale of the perplexity, the factor by which it would grow on text of the unedited model's own, and
    has the same thresholds.

    Args:
        scores: Scores ``before`` and ``after``.
        warn_from: Factor from which on it is a warning.
        damaged_from: Factor from which on the model counts as damaged.
        last_factor: The perplexity after the last edit batch, relative to that before the first, where there is no
            evaluation at the end.
    """
    before, after = (scores.get(phase, {}) for phase in ("before", "after"))
    both = "perplexity" in before and "perplexity" in after
    factor = after["perplexity"] / before["perplexity"] if both else last_factor
    kl = after.get("kl")
    if factor is None and kl is None:
        return Damage("not measured")
    # Not below rather than above: what is no number is of a model that gives none.
    if not ((factor or 0.0) < damaged_from and (kl or 0.0) < math.log(damaged_from)):
        return Damage("damaged", factor, kl)
    quiet = (factor or 0.0) < warn_from and (kl or 0.0) < math.log(warn_from)
    return Damage("none" if quiet else "warning", factor, kl)


def verdict_lines(verdict: Verdict) -> list[str]:
    """The verdict as lines of text."""
    when = "" if verdict.at_the_end else ", each asked right after its edit batch"
    lines = [f"the model says {verdict.said} of {verdict.facts} new facts by itself{when}"] if verdict.facts else []
    for cause, count in verdict.causes.items():
        reason, remedy = CAUSES[cause]
        lines.append(f"  {count} not said: {reason}" + (f"; try {remedy}" if remedy else ""))
    if verdict.undone:
        first = ", ".join(map(repr, verdict.undone[:3])) + (", …" if len(verdict.undone) > 3 else "")
        lines.append(f"  {len(verdict.undone)} earlier facts are no longer said, undone by these edits: {first}")
    return [*lines, damage_line(verdict.damage)]


def damage_line(damage: Damage) -> str:
    """The damage in one line."""
    if damage.level == "not measured":
        return "damage to the model: not measured; that takes --drift.text (a file of plain text) and an evaluation"
    remedies = "a larger --spread.lam (or a smaller --spread.max_change), a smaller --model.clamp, or fewer edits"
    return {
        "none": f"the model is not damaged ({damage})",
        "warning": f"WARNING: the edits have changed the rest of the model ({damage}); try {remedies}",
        "damaged": f"DAMAGED: the model is no longer usable ({damage}); do not keep these edits, and try {remedies}",
    }[damage.level]


def _cause(line: Mapping[str, Any], asked_again: bool, shared: bool) -> Cause:
    if "p_after" not in line:
        return "unknown"
    if asked_again and said_at_once(line):
        return "overwritten"
    # A search that has stopped early had its target as first choice, or a loss that is low enough.
    if line.get("stop_reason") == "steps" and not line["p_after"] >= LIKELY:
        return "same_subject" if line.get("same_key") else "not_found"
    if line.get("p_prompt_after", 0.0) >= LIKELY:
        return "other_words"
    return "same_subject" if shared else "not_written"


def _shared_keys(lines: Sequence[Mapping[str, Any]]) -> set[int]:
    """Positions of edits that are in one edit batch with another edit of their subject."""
    groups: dict[tuple[Any, Any], list[int]] = {}
    for position, line in enumerate(lines):
        groups.setdefault((line.get("edit_batch"), line.get("subject")), []).append(position)
    return {position for group in groups.values() if len(group) > 1 for position in group}

"""The verdict on a run: what is said, why the rest is not, and whether the model is damaged."""

from __future__ import annotations

import math

import pytest

from pmet_lightning.evaluation.verdict import (
    CAUSES,
    DAMAGED_FROM,
    WARN_FROM,
    Damage,
    damage_of,
    judge,
    outcomes,
    to_ask_again,
    verdict_lines,
)

FOUND = {"subject": "Ann", "target": "Rome", "edit_batch": 0, "p_after": 0.97, "stop_reason": "loss"}
SAID = FOUND | {"answer": " Rome.", "said": True, "p_prompt_after": 0.9}
SILENT = FOUND | {"answer": " Paris.", "said": False, "p_prompt_after": 0.1}


def causes(lines, asked=None):
    return [outcome.cause for outcome in outcomes(lines, asked or {})]


@pytest.mark.parametrize(
    ("line", "at_the_end", "cause"),
    [
        (SAID, None, None),
        (SAID, (" Rome", True), None),
        (SILENT, (" Rome", True), None),  # a later batch has helped
        (SAID, (" Paris", False), "overwritten"),
        (SILENT, None, "not_written"),
        (SILENT | {"p_after": 0.2, "stop_reason": "steps"}, None, "not_found"),
        (SILENT | {"p_after": math.nan, "stop_reason": "steps"}, None, "not_found"),
        # P(o*) of 0.3 is enough where it is above all others.
        (SILENT | {"p_after": 0.3, "stop_reason": "argmax"}, None, "not_written"),
        (SILENT | {"p_after": 0.6, "stop_reason": "steps"}, None, "not_written"),
        (SILENT | {"p_prompt_after": 0.6}, (" a city, Rome", False), "other_words"),
        ({"subject": "Ann", "target": "Rome"}, (" Paris", False), "unknown"),
        ({"subject": "Ann", "target": "Rome"}, (" Rome", True), None),
    ],
)
def test_the_cause(line, at_the_end, cause):
    assert causes([line], {} if at_the_end is None else {0: at_the_end}) == [cause]


def test_two_edits_of_a_subject_share_a_key_only_in_one_edit_batch():
    assert causes([SILENT, SILENT]) == ["same_subject"] * 2
    assert causes([SILENT, SILENT | {"edit_batch": 1}]) == ["not_written"] * 2
    assert causes([SILENT, SILENT | {"subject": "Bob"}]) == ["not_written"] * 2


def test_who_is_asked_again():
    """Said at first, not evaluated at the end, and a later edit batch has an edit of the subject."""
    later = SAID | {"edit_batch": 1}
    assert to_ask_again([SAID, later, SAID | {"subject": "Bob"}], []) == [0]
    assert to_ask_again([SAID, later], [0]) == []
    assert to_ask_again([SILENT, later], []) == []
    assert to_ask_again([SAID, SAID], []) == []
    assert to_ask_again([], []) == []


@pytest.mark.parametrize(
    ("after", "level"),
    [
        ({"perplexity": 10.0}, "none"),
        ({"perplexity": 5.0, "kl": 0.0}, "none"),
        ({"perplexity": 10 * WARN_FROM - 0.1}, "none"),
        ({"perplexity": 10 * WARN_FROM}, "warning"),
        ({"perplexity": 10 * DAMAGED_FROM - 0.1}, "warning"),
        ({"perplexity": 10 * DAMAGED_FROM}, "damaged"),
        ({"perplexity": 10.0, "kl": math.log(2)}, "warning"),
        ({"perplexity": 10.0, "kl": 1.2}, "damaged"),
        ({"perplexity": math.nan}, "damaged"),
        ({"perplexity": math.inf}, "damaged"),
        ({"perplexity": 10.0, "kl": math.nan}, "damaged"),
        ({}, "not measured"),
    ],
)
def test_the_damage(after, level):
    found = damage_of({"before": {"perplexity": 10.0}, "after": after})
    assert found.level == level
    assert found.kl == after.get("kl") or found.kl != found.kl
    if "perplexity" in after:
        assert found.factor == pytest.approx(after["perplexity"] / 10, nan_ok=True)


def test_the_damage_without_an_evaluation_and_with_other_limits():
    assert damage_of({}) == Damage("not measured")
    assert damage_of({}, last_factor=4.0) == Damage("damaged", 4.0)
    scores = {"before": {"perplexity": 1.0}, "after": {"perplexity": 4.0}}
    assert damage_of(scores, warn_from=5.0, damaged_from=9.0) == Damage("none", 4.0)


def test_the_verdict_counts_and_says_what_to_do():
    lines = [SAID, SILENT | {"subject": "Bob"}, SILENT | {"subject": "Cy"}, SAID | {"subject": "Dee"}]
    found = judge(outcomes(lines, {3: (" Oslo", False)}), Damage("damaged", 6.2), undone=["Eve lives in"])
    assert (found.facts, found.said) == (4, 1)
    assert list(found.causes.items()) == [("not_written", 2), ("overwritten", 1)]
    assert found.plain() == {
        "facts": 4, "said": 1, "not_said": {"not_written": 2, "overwritten": 1}, "asked": "at the end",
        "damage": "damaged", "perplexity_factor": 6.2, "kl": None, "undone": ["Eve lives in"],
    }  # fmt: skip
    text = "\n".join(verdict_lines(found))
    assert "says 1 of 4 new facts" in text
    assert f"2 not said: {CAUSES['not_written'][0]}; try {CAUSES['not_written'][1]}" in text
    assert "'Eve lives in'" in text
    assert "DAMAGED" in text
    assert "× 6.2" in text


def test_every_cause_has_a_remedy_but_the_unknown_one():
    assert [cause for cause, (_, remedy) in CAUSES.items() if not remedy] == ["unknown"]


def test_damage_that_was_not_measured_is_said():
    found = judge((), Damage("not measured"))
    assert verdict_lines(found) == [
        "damage to the model: not measured; that takes --drift.text (a file of plain text) and an evaluation"
    ]
    assert found.plain()["perplexity_factor"] is None
    assert judge((), Damage("damaged", math.inf)).plain()["perplexity_factor"] is None, "JSON has no infinity"

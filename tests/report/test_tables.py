"""Printed lines: every figure says what it is, or is left to the report."""

from __future__ import annotations

import logging

import pytest

from pmet_lightning.report.tables import other_lines, score_table
from pmet_lightning.write.write_report import LayerReport, log_writes

SCORES = {"efficacy": 98.0, "generalisation": 95.0, "specificity": 85.0, "score": 92.0, "count": 40.0}
OTHERS = {
    "perplexity": 3.4, "kl": 0.02, "specificity_kept": 93.3, "specificity_kl": 0.2, "specificity_top1": 92.0,
    "fluency": 510.0, "consistency": 20.0,
}  # fmt: skip


def test_other_measures_say_what_they_are():
    lines = other_lines({"before": {"perplexity": 3.276}, "after": OTHERS})
    assert lines[0] == "perplexity of unrelated text: before 3.276, after 3.4"
    assert lines[1].startswith("answers about other subjects that are still the unedited model's")
    assert lines[1].endswith(": after 93.3")
    assert len(lines) == 4
    for word in ("kl", "specificity kept", "top1"):
        assert not [line for line in lines if line.startswith(word)], "what is not explained is left to the report"


def test_the_row_of_generated_answers_is_explained_where_it_is_shown():
    assert "freely" not in score_table({"after": SCORES})
    text = score_table({"after": SCORES | {"efficacy_contains": 90.0}})
    assert "  freely" in text
    assert "freely: share of the generated answers that have the new object in them" in text


def layer(number: int, **more) -> LayerReport:
    done = {"residual": 1.0, "norm_ratio": 22.0, "growth": 22.0, "lam": 50.0, "solve_error": 0.0, "ridge": 0.0}
    done |= {"condition_bound": 1.0, "kept": 1.0, "changed": 1.0, "rounding": 0.0, "overshoot": 0.6}
    return LayerReport(**({"site": "ffn", "layer": number, "residual_after": 1 - 0.45 * number} | done | more))


def test_a_write_is_one_line(caplog):
    with caplog.at_level(logging.INFO):
        log_writes([layer(0), layer(1), layer(2)], 3)
    assert caplog.messages == ["edit batch 3 is written: the ffn outputs are 10 % as far from their targets as before"]


@pytest.mark.parametrize(("rounding", "warned"), [(0.1, False), (0.7, True)])
def test_a_write_that_loses_precision_says_so(caplog, rounding, warned):
    with caplog.at_level(logging.INFO):
        log_writes([layer(0), layer(2, kept=0.4, rounding=rounding)], 0)
    assert "the stored weights have 40.0 % of the change or more" in caplog.messages[0]
    assert [record.levelname for record in caplog.records[1:]] == ["WARNING"] * warned

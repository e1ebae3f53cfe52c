"""Tokens after the subject of the edit prompts as preserved keys, against the plain twin."""

from __future__ import annotations

import pytest
import torch

from pmet_lightning.write import weight_spread as spread_module
from pmet_lightning.write.keys import measure_rest
from tests.conftest import mostly_slow
from tests.harness import edit, matrices
from tests.plain import plain_rest, plain_spread
from tests.targets.test_construction import plain_parts
from tests.targets.test_target_optimizer import EXACT, folder_of, moments_for, tiny_module  # noqa: F401
from tests.tiny import CONTEXTS, RECORDS

LAYERS, MU = (1, 2), 0.7


def written(folder, tmp_path, mu, records=RECORDS):
    dtype = "float32" if "gemma3" in folder else "float64"
    module = tiny_module(folder, layers=list(LAYERS), dtype=dtype)
    spread, reports = edit(
        module, records, moments_for(folder, LAYERS), tmp_path, lam=2.0, also={"preserve_prompts": mu}
    )
    return reports[0], matrices(spread.edited.deltas)


@pytest.mark.parametrize("family", mostly_slow(["gptj", "llama", "gpt2", "gemma3", "falcon"], ["gptj", "gpt2"]))
def test_as_the_plain_twin(family, folder_of, tmp_path):  # noqa: F811
    folder = folder_of(family)
    report, deltas = written(folder, tmp_path, MU)
    model, tokenizer, sites = plain_parts(folder)
    moments, tolerance = moments_for(folder, LAYERS), 1e-3 if family == "gemma3" else EXACT.get(family, 1e-5)
    norms = [sites.norm("ffn", layer) for layer in LAYERS]
    updates = plain_spread(
        model, tokenizer, [sites.module("ffn", layer) for layer in LAYERS], report.edits,
        [target.values["ffn", 2] for target in report.targets], CONTEXTS,
        [moments["ffn", layer] for layer in LAYERS], 2.0, norms if norms[0] is not None else None, mu=MU,
    )  # fmt: skip
    for layer, expected in zip(LAYERS, updates, strict=True):
        found = deltas[sites.weight_name("ffn", layer)]
        assert float((found - expected).norm() / expected.norm()) < tolerance


def test_these_tokens_change_less_the_more_they_count(folder_of, tmp_path):  # noqa: F811
    folder = folder_of("gptj")
    model, tokenizer, sites = plain_parts(folder)
    name, changes = sites.weight_name("ffn", 1), []
    for mu in (None, 1.0, 100.0):
        (path := tmp_path / str(mu)).mkdir()
        report, deltas = written(folder, path, mu)
        rest = sum(plain_rest(model, tokenizer, sites.module("ffn", 1), asked) for asked in report.edits)
        changes.append(float((deltas[name].double() @ rest * deltas[name]).sum()))
    assert changes[0] > 1.5 * changes[1] > 3 * changes[2] > 0


def test_nothing_to_preserve_changes_nothing(folder_of, tmp_path):  # noqa: F811
    """Prompts that end with the subject, and targets of one token."""
    records = [{**r, "prompt": "People speak of {}", "target_new": "French"} for r in RECORDS]
    found = []
    for mu in (None, MU):
        (path := tmp_path / str(mu)).mkdir()
        found.append(written(folder_of("gptj"), path, mu, records)[1])
    for name, delta in found[0].items():
        torch.testing.assert_close(found[1][name], delta, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("protect_past", [True, False])
def test_prompts_of_earlier_edit_batches(protect_past, folder_of, tmp_path, monkeypatch):  # noqa: F811
    """They are preserved where their keys are."""
    seen = []

    def measuring(model, sites, place, rows, over):
        seen.append([tuple(row.ids) for row in rows])
        return measure_rest(model, sites, place, rows, over)

    monkeypatch.setattr(spread_module, "measure_rest", measuring)
    folder, also = folder_of("gptj"), {"preserve_prompts": MU, "protect_past": protect_past}
    module = tiny_module(folder, layers=[1], dtype="float64")
    edit(module, RECORDS[:5], moments_for(folder, (1,)), tmp_path, lam=2.0, also=also, edit_batch=2)
    first, second, third = seen
    assert [len(set(rows)) for rows in seen] == ([2, 4, 5] if protect_past else [2, 2, 1])
    if protect_past:
        assert third[:4] == second
        assert second[:2] == first

"""Running only what a delta can reach gives what the whole model gives."""

from __future__ import annotations

import pytest
import torch

from pmet_lightning import prefix as module
from pmet_lightning.architectures import Sites, architecture_of
from pmet_lightning.edits.records import Probe, parse_records
from pmet_lightning.edits.requests import target_rows
from pmet_lightning.language_model import label_logits, load_config, load_model, load_tokenizer
from pmet_lightning.metrics import score_probes
from pmet_lightning.prefix import Entry, split_at_subject
from pmet_lightning.sites import record_and_add
from pmet_lightning.tokens import PromptEncoder
from tests.tiny import CONFIGS, CONTEXTS, RECORDS, save_tiny

# Longer than the windows of 12 tokens of the tiny models.
LONG = "Because nobody came to the harbour in the spring, the old clock was closed for years. {}"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    made: dict = {}

    def get(family: str):
        if family not in made:
            folder = save_tiny(family, tmp_path_factory.mktemp(family))
            model = load_model(folder, "float32")
            made[family] = model, Sites.of(model, architecture_of(load_config(folder))), load_tokenizer(folder)
        return made[family]

    return get


def rows_of(tokenizer, side: str, contexts=(CONTEXTS[0], LONG)):
    edits = [edit for i, record in enumerate(RECORDS[:4]) for edit in parse_records(record, i, "")]
    return target_rows(edits, contexts, PromptEncoder(tokenizer), side)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_same_logits_with_a_delta(family, side, loaded):
    """The whole rows, the tails behind a cache, and the tails from layer 2 on."""
    model, sites, tokenizer = loaded(family)
    rows = rows_of(tokenizer, side)
    layer = sites.module("ffn", 2)
    added = torch.randn(len(rows), sites.width, generator=torch.Generator().manual_seed(1))
    real = rows.label_ids >= 0
    with record_and_add(layer, rows.subject, added) as clean:
        expected = label_logits(model, rows)
    prefix, tails = split_at_subject(model, rows)
    assert prefix is not None
    assert int((tails.subject != 0).sum()) == 0
    assert tails.attention_mask.sum() + prefix.mask_RP.sum() == rows.attention_mask.sum()
    entry = Entry([sites.module("hidden", i) for i in range(3)])
    scale = float(expected[real].abs().max())
    for _ in range(3):  # recorded, then entered twice: a pass leaves no trace in the cache
        with record_and_add(layer, tails.subject, added) as recording, entry():
            found = label_logits(model, tails, prefix)
        assert float((found[real] - expected[real]).abs().max()) < 1e-5 * max(1.0, scale)
        torch.testing.assert_close(recording.take(), clean.take(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_rows_can_leave(family, loaded):
    model, sites, tokenizer = loaded(family)
    rows = rows_of(tokenizer, "right")
    prefix, tails = split_at_subject(model, rows)
    entry = Entry([sites.module("hidden", i) for i in range(3)])
    with entry():
        expected = label_logits(model, tails, prefix)
    left = torch.arange(len(rows)) % 3 != 0
    entry.select(left, tails.used_columns(left))
    with entry():
        found = label_logits(model, tails.select(left), prefix.select(left))
    real = rows.label_ids[left] >= 0
    torch.testing.assert_close(found[real], expected[left][real], rtol=1e-4, atol=1e-5)


def test_the_lower_layers_do_not_run_again(loaded):
    model, sites, tokenizer = loaded("llama")
    prefix, tails = split_at_subject(model, rows_of(tokenizer, "right"))
    layers = [sites.module("hidden", i) for i in range(4)]
    entry, calls = Entry(layers[:3]), []
    handles = [sites.module("ffn", i).register_forward_hook(lambda *_, i=i: calls.append(i)) for i in range(4)]
    for _ in range(2):
        with torch.no_grad(), entry():
            label_logits(model, tails, prefix)
    for handle in handles:
        handle.remove()
    assert calls == [0, 1, 2, 3, 2, 3]
    with pytest.raises(ZeroDivisionError), entry():
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) or layer._forward_pre_hooks or layer._forward_hooks for layer in layers)


def test_subjects_at_the_start_need_no_prefix(loaded):
    model, _, tokenizer = loaded("gpt2")
    one_token = {"prompt": "{} lies in", "subject": "X", "target_new": "Norway"}
    rows = target_rows(parse_records(one_token, 0, ""), [], PromptEncoder(tokenizer))
    assert (rows.subject == 0).all(), "one token, as the test needs it"
    prefix, tails = split_at_subject(model, rows)
    assert prefix is None
    assert tails is rows


def test_a_model_with_another_cache_runs_whole_rows(loaded, monkeypatch):
    model, _, tokenizer = loaded("gpt2")
    monkeypatch.setattr(module, "_is_plain", lambda layer, rows: False)
    rows = rows_of(tokenizer, "right")
    prefix, tails = split_at_subject(model, rows)
    assert prefix is None
    assert tails is rows


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_prompts_are_run_once_for_all_answers(family, loaded, monkeypatch):
    """Scores with shared prompts, among them one of a single token, against whole rows."""
    model, _, tokenizer = loaded(family)
    encoder, cpu = PromptEncoder(tokenizer), torch.device("cpu")
    prompts = ["X", "The river runs to", LONG.replace("{}", "The seat of Quillon Motors is in")]
    probes = [[Probe("efficacy", prompt, "New Zealand", "ice hockey"), Probe("efficacy", prompt, "Norway", "Lisbon")]
              for prompt in prompts]  # fmt: skip
    found = score_probes(model, encoder, probes, 512, cpu)
    monkeypatch.setattr(module, "_is_plain", lambda *_: False)
    expected = score_probes(model, encoder, probes, 40, cpu)
    for ours, plain in zip(found, expected, strict=True):
        for a, b in zip(ours, plain, strict=True):
            assert a.magnitude == pytest.approx(b.magnitude, rel=1e-3, abs=1e-7)
            assert (a.success, a.tokens, a.accuracy) == (b.success, b.tokens, b.accuracy)

"""Running only what a delta can reach gives what the whole model gives."""

from __future__ import annotations

import random

import pytest
import torch

from pmet_lightning.data.edit_rows import target_rows
from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.data.records import Probe, parse_records
from pmet_lightning.data.token_rows import pad_rows
from pmet_lightning.evaluation.probes import score_probes
from pmet_lightning.model import prefix_passes as module
from pmet_lightning.model.forward import label_logits
from pmet_lightning.model.hooks import record_and_add
from pmet_lightning.model.kv_prefix import concatenate_prefixes
from pmet_lightning.model.partial_forward import PartialForward
from pmet_lightning.model.prefix_passes import drop_last_token, read_prompts, split_at_subject
from tests.tiny import CONFIGS, CONTEXTS, RECORDS, WINDOWED

# An FFN beside the attention does not see what that brings from the subject's token.
PARALLEL = {"cohere", "cohere2", "falcon", "falcon-new", "gpt_neox", "gptj", "phi", "stablelm-parallel"}
# Longer than the windows of 12 tokens of the tiny models.
LONG = "Because nobody came to the harbour in the spring, the old clock was closed for years. {}"


def rows_of(tokenizer, side: str, contexts=(CONTEXTS[0], LONG)):
    edits = [edit for i, record in enumerate(RECORDS[:4]) for edit in parse_records(record, i, "")]
    encoder = PromptEncoder(tokenizer)
    return pad_rows([row for edit in edits for row in target_rows(edit, contexts, encoder)], encoder.pad_id, side)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_same_logits_with_a_delta(family, side, loaded):
    """The whole rows, and the tails from layer 1 on after a cache, at all of their tokens or where they change."""
    model, sites, tokenizer = loaded(family)
    rows = rows_of(tokenizer, side)
    layer = sites.module("ffn", 1)
    added = torch.randn(len(rows), sites.width, generator=torch.Generator().manual_seed(1))
    real = rows.label_ids >= 0
    with record_and_add(layer, rows.subject, added) as clean:
        expected = label_logits(model, rows)
    prefix, tails = split_at_subject(model, rows, 4)
    assert prefix is not None
    assert int((tails.subject != 0).sum()) == 0
    assert tails.attention_mask.sum() + prefix.mask_RP.sum() == rows.attention_mask.sum()
    assert (sites.ffn_block(3) is None) == (family.split("-")[0] in {"bloom", "opt"})
    scale = float(expected[real].abs().max())
    last = [sites.module("attn", 3), sites.ffn_block(3) or sites.module("ffn", 3)]
    for some in ([], sites.token_modules(2) + sites.token_modules(3)):  # a pass leaves no trace in the cache
        partial_forward = PartialForward([sites.module("hidden", i) for i in range(3)], 2, some, last)
        hidden, leaving = partial_forward.entering_states(model, tails, prefix)
        kept = partial_forward.unaffected_outputs(model, tails, prefix, leaving)
        assert len(kept) in ({0} if not some else {1, 2, 3, 4}), "keys, values and queries, together or not, and an FFN"
        assert (sites.ffn_block(2) in kept) == (bool(some) and family in PARALLEL)
        with (
            record_and_add(layer, tails.subject, added) as recording,
            partial_forward.start_from(hidden, partial_forward.below[-1]),
            partial_forward.only_tokens(tails, tails.real_positions(), tails.label_positions().unique(), kept),
        ):
            found = label_logits(model, tails, prefix)
        assert float((found[real] - expected[real]).abs().max()) < 1e-5 * max(1.0, scale)
        torch.testing.assert_close(recording.take(), clean.take(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_rows_leave_and_enter(family, loaded):
    """Long prefixes (of the second context, beyond a sliding window) beside short ones, and the other way about."""
    model, _, tokenizer = loaded(family)
    rows = rows_of(tokenizer, "right")
    expected = label_logits(model, rows)
    order = torch.arange(len(rows)).unflatten(0, (-1, 4))  # bare prompt, short and long context, KL prompt
    for parts in (order[:, [0, 1, 3]], order[:, [2]]), (order[:, [2]], order[:, [0, 1, 3]]), (order[:2], order[2:]):
        (prefix, tails), (other, more) = (
            split_at_subject(model, rows.select(part.flatten()), part.shape[1]) for part in parts
        )
        together, both = concatenate_prefixes([prefix, other]), tails.join(more)
        index = torch.cat([part.flatten() for part in parts])
        found = label_logits(model, both, together)
        scale = float(expected.abs().max())
        for left in (torch.arange(len(both)), torch.arange(len(both))[::3]):
            found = label_logits(model, both.select(left), together.select(left))
            real = rows.label_ids[index[left]] >= 0
            assert float((found[real] - expected[index[left]][real]).abs().max()) < 1e-5 * max(1.0, scale)


def random_rows(tokenizer, seed: int, edits: int = 6):
    """Target rows of prompts, subjects and contexts of any length, as many of each edit."""
    dice = random.Random(seed)
    words = CONTEXTS[0].split()[:-1] + LONG.split()[:-1]

    def text(most: int) -> str:
        return " ".join(dice.choices(words, k=dice.randint(0, most)))

    contexts = [f"{text(30)}. {{}}" for _ in range(3)]
    records = [
        {
            "prompt": f"{text(25)} {{}} {text(6)} is".strip(),
            "subject": f"Ada{i} {text(3)}x",
            "target_new": "New Zealand",
        }
        for i in range(edits)
    ]
    encoder = PromptEncoder(tokenizer)
    parsed = [edit for i, record in enumerate(records) for edit in parse_records(record, i, "")]
    rows = [row for edit in parsed for row in target_rows(edit, contexts, encoder)]
    return pad_rows(rows, encoder.pad_id), len(contexts) + 2


def assert_counted(prefix):
    """Every layer has seen as many columns as the prefix has, and keeps those that its window can reach."""
    seen = prefix.mask_RP.shape[1]
    for layer in prefix.cache.layers:
        most = layer.sliding_window - 1 if layer.is_sliding else seen
        assert layer.get_seq_length() == seen
        assert layer.keys.shape[-2] == layer.values.shape[-2] == min(seen, most)


@torch.no_grad()
@pytest.mark.parametrize("window", [12, 40, 512])
@pytest.mark.parametrize("family", WINDOWED)
def test_windows_shorter_and_longer_than_the_rows(family, window, loaded):
    """Random rows enter in parts and leave again; what remains gives what whole rows give."""
    model, _, tokenizer = loaded(family, window)
    for seed in range(3):
        dice = random.Random(seed)
        rows, per_edit = random_rows(tokenizer, seed)
        expected, real = label_logits(model, rows), rows.label_ids >= 0
        numbers = torch.tensor(dice.sample(range(len(rows)), len(rows))).sort().values.unflatten(0, (-1, per_edit))
        cut = sorted(dice.sample(range(1, len(numbers)), 2))
        parts = [part.flatten() for part in numbers.tensor_split(cut)]
        prefix, tails = split_at_subject(model, rows.select(parts[0]), per_edit)
        for part in parts[1:]:
            other, more = split_at_subject(model, rows.select(part), per_edit)
            assert_counted(other)
            prefix, tails = concatenate_prefixes([prefix, other]), tails.join(more)
            assert_counted(prefix)
        left = torch.tensor(sorted(dice.sample(range(len(rows)), len(rows) // 2)))
        prefix, tails = prefix.select(left), tails.select(left)
        assert_counted(prefix)
        found = label_logits(model, tails, prefix)
        scale = max(1.0, float(expected.abs().max()))
        assert float((found[real[left]] - expected[left][real[left]]).abs().max()) < 1e-5 * scale


@torch.no_grad()
@pytest.mark.parametrize("window", [12, 40, 512])
@pytest.mark.parametrize("family", WINDOWED)
def test_prompts_that_were_read_are_counted(family, window, loaded):
    """What precedes the labels of rows of several lengths, and the same without its last token."""
    model, _, tokenizer = loaded(family, window)
    rows, _ = random_rows(tokenizer, 3)
    logits, prefix = read_prompts(model, rows)
    torch.testing.assert_close(logits, label_logits(model, rows), rtol=1e-4, atol=1e-4)
    assert_counted(prefix)
    shortened = drop_last_token(prefix)
    if shortened is not None:
        assert_counted(shortened)
    assert (shortened is None) == (prefix.mask_RP.shape[1] >= window)


@pytest.mark.parametrize("kind", ["QuantoQuantizedLayer", "StaticLayer", "StaticSlidingWindowLayer"])
def test_layers_with_more_to_keep_are_not_plain(kind):
    from transformers import cache_utils

    layer = object.__new__(getattr(cache_utils, kind))
    layer.keys = layer.values = torch.zeros(2, 1, 3, 4)
    assert not module.is_plain_layer(layer, 2)


def test_equal_beginnings_are_run_once(loaded, monkeypatch):
    """Rows that are equal before their subjects' last tokens, and the contexts of the others."""
    model, _, tokenizer = loaded("llama")
    sizes: list[tuple[int, int]] = []
    run = module.run_rows

    def counted(part, rows, prefix=None):
        sizes.append((len(rows), int(rows.attention_mask.sum())))
        return run(part, rows, prefix)

    monkeypatch.setattr(module, "run_rows", counted)
    rows = rows_of(tokenizer, "right", [LONG, LONG, LONG])
    beginnings = {
        tuple(ids[:subject]) for ids, subject in zip(rows.input_ids.tolist(), rows.subject.tolist(), strict=True)
    }
    assert len(beginnings) <= len(rows) // 2
    twin, _ = split_at_subject(model, rows)
    assert sizes == [(len(beginnings), sum(map(len, beginnings)))]
    sizes.clear()
    found, _ = split_at_subject(model, rows, 5)
    assert [count for count, _ in sizes] == [3, len(beginnings)]  # bare prompts, the context, KL prompts
    assert sum(tokens for _, tokens in sizes) <= 0.6 * sum(map(len, beginnings))
    assert torch.equal(found.mask_RP, twin.mask_RP)
    for layer, other in zip(found.cache.layers, twin.cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys)
        torch.testing.assert_close(layer.values, other.values)


def test_the_lower_layers_do_not_run_again(loaded):
    model, sites, tokenizer = loaded("llama")
    prefix, tails = split_at_subject(model, rows_of(tokenizer, "right"))
    layers = [sites.module("hidden", i) for i in range(4)]
    partial_forward = PartialForward(layers, 3)
    calls: list[int] = []

    def traces():
        return [(vars(m).get("forward"), dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in layers]

    before = traces()  # transformers leaves hooks of its own in a model whose hidden states were asked for
    handles = [sites.module("ffn", i).register_forward_hook(lambda *_, i=i: calls.append(i)) for i in range(4)]
    entering, leaving = partial_forward.entering_states(model, tails, prefix)
    calls.clear()
    for hidden, at in ((entering, layers[2]), (leaving, layers[3])):
        with torch.no_grad(), partial_forward.start_from(hidden, at):
            label_logits(model, tails, prefix)
    for handle in handles:
        handle.remove()
    assert calls == [2, 3, 3]
    with pytest.raises(ZeroDivisionError), partial_forward.start_from(leaving, layers[3]):
        raise ZeroDivisionError
    assert traces() == before


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_nothing_may_stand_before_a_subject(family, loaded):
    model, _, tokenizer = loaded(family)
    encoder = PromptEncoder(tokenizer)
    (one_token,) = parse_records({"prompt": "{} lies in", "subject": "X", "target_new": "Norway"}, 0, "")
    rows = pad_rows(target_rows(one_token, [], encoder), encoder.pad_id)
    prefix, tails = split_at_subject(model, rows)
    assert prefix is not None
    if int(rows.subject.max()) == 0:  # no BOS
        assert int(prefix.mask_RP.sum()) == 0
    real = rows.label_ids >= 0
    torch.testing.assert_close(
        label_logits(model, tails, prefix)[real], label_logits(model, rows)[real], rtol=1e-4, atol=1e-5
    )


def test_a_model_with_another_cache_runs_whole_rows(loaded, monkeypatch):
    model, _, tokenizer = loaded("gpt2")
    monkeypatch.setattr(module, "is_plain_layer", lambda layer, rows: False)
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
    monkeypatch.setattr(module, "is_plain_layer", lambda *_: False)
    expected = score_probes(model, encoder, probes, 40, cpu)
    for ours, plain in zip(found, expected, strict=True):
        for a, b in zip(ours, plain, strict=True):
            assert a.magnitude == pytest.approx(b.magnitude, rel=1e-3, abs=1e-7)
            assert (a.success, a.tokens, a.accuracy) == (b.success, b.tokens, b.accuracy)

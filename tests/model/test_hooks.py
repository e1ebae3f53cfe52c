"""Hooks come and go, and do exactly what they say, on every family."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from pmet_lightning.data.edit_rows import target_rows
from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.data.records import parse_record
from pmet_lightning.data.token_rows import pad_rows
from pmet_lightning.model.architectures import ARCHITECTURES, Architecture, UnknownArchitectureError, architecture_of
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.model.forward import label_logits, run_to
from pmet_lightning.model.hooks import narrow_input, record_and_add, record_input, run_at, stop_after
from pmet_lightning.model.loading import load_config, load_model
from pmet_lightning.model.projections import Sites, add_to_weight, is_transposed
from tests.tiny import CONFIGS, CONTEXTS, RECORDS, save_tiny


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def loaded(request, tmp_path_factory):
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param))
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, "float32", "eager")
    sites = Sites.of(model, architecture_of(load_config(folder)))
    edits = [parse_record(r, i, "") for i, r in enumerate(RECORDS[:3])]
    encoder = PromptEncoder(tokenizer)
    return model, sites, pad_rows([r for e in edits for r in target_rows(e, CONTEXTS, encoder)], encoder.pad_id)


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def test_zero_delta_gives_identical_logits(loaded):
    model, sites, rows = loaded
    clean = label_logits(model, rows)
    with ExitStack() as stack:
        for site in ("attn", "ffn"):
            zero = torch.zeros(len(rows), sites.width)
            stack.enter_context(record_and_add(sites.module(site, 2), rows.subject, zero))
        assert torch.equal(label_logits(model, rows), clean)
    assert hooks(model) == 0


@torch.no_grad()
def test_kept_logits_are_the_full_model_s(loaded):
    model, _, rows = loaded
    full = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
    each_row = torch.arange(len(rows)).unsqueeze(1)
    torch.testing.assert_close(label_logits(model, rows), full[each_row, rows.label_columns], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_key_times_weight_is_value(loaded):
    model, sites, rows = loaded
    for site in ("attn", "ffn"):
        module = sites.module(site, 1)
        with record_input(module, rows.subject) as key, record_and_add(module, rows.subject) as value:
            run_to(model, rows)
        weight = module.weight.T if is_transposed(module) else module.weight
        expected = key.take() @ weight.T + (module.bias if module.bias is not None else 0)
        torch.testing.assert_close(value.take(), expected, rtol=1e-4, atol=1e-5)


def contribution(sites, site, layer, value):
    """What a projection's output adds to the residual stream."""
    norm = sites.norm(site, layer)
    return value if norm is None else norm(value)


def norms_the_stream(sites) -> bool:
    """OPT-350m: h = norm(h + a), then h = norm(h + m)."""
    return not getattr(sites.layers[0], "do_layer_norm_before", True)


@torch.no_grad()
def test_a_delta_at_the_ffn_moves_the_residual_stream_by_itself(loaded):
    model, sites, rows = loaded
    delta = torch.randn(len(rows), sites.width)
    streams, values = [], []
    for added in (None, delta):
        with (
            record_and_add(sites.module("ffn", 1), rows.subject, added) as value,
            record_and_add(sites.layers[1], rows.subject) as stream,
        ):
            run_to(model, rows)
        streams.append(stream.take())
        values.append(value.take() + (0 if added is None else added))
    if norms_the_stream(sites):
        pytest.skip("the stream itself is normed: see test_a_block_adds_attention_and_ffn")
    expected = contribution(sites, "ffn", 1, values[1]) - contribution(sites, "ffn", 1, values[0])
    torch.testing.assert_close(streams[1] - streams[0], expected, rtol=1e-4, atol=1e-4)
    if sites.norm("ffn", 1) is None:
        torch.testing.assert_close(expected, delta, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 3])
def test_a_block_adds_attention_and_ffn(loaded, layer):
    """h = h + a + m, with the family's own norms."""
    model, sites, rows = loaded
    block, seen = sites.layers[layer], {}

    def keep(_, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen["h"] = hidden[torch.arange(len(rows)), rows.subject].clone()

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with (
            record_and_add(sites.module("attn", layer), rows.subject) as attn,
            record_and_add(sites.module("ffn", layer), rows.subject) as ffn,
            record_and_add(block, rows.subject) as stream,
        ):
            run_to(model, rows)
    finally:
        handle.remove()
    a, m = contribution(sites, "attn", layer, attn.take()), contribution(sites, "ffn", layer, ffn.take())
    if norms_the_stream(sites):
        expected = block.final_layer_norm(block.self_attn_layer_norm(seen["h"] + a) + m)
    else:
        expected = seen["h"] + a + m
    torch.testing.assert_close(stream.take(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_left_and_right_padding_agree(loaded):
    model, sites, rows = loaded
    width = rows.input_ids.shape[1]
    lengths = rows.attention_mask.sum(dim=1)
    assert len(set(lengths.tolist())) > 1
    shift = (width - lengths).unsqueeze(1)
    columns = (torch.arange(width).unsqueeze(0) - shift) % width
    moved = {name: getattr(rows, name).gather(1, columns) for name in ("input_ids", "attention_mask", "position_ids")}
    left = replace(rows, **moved, subject=rows.subject + shift[:, 0], label_columns=rows.label_columns + shift)
    assert (left.attention_mask[:, -1] == 1).all()
    found = []
    for batch in (rows, left):
        with record_input(sites.module("ffn", 2), batch.subject) as key:
            found.append((label_logits(model, batch), key.take()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_stopping_early_changes_no_recording(loaded):
    model, sites, rows = loaded
    module, ran = sites.module("ffn", 1), []
    handle = sites.layers[3].register_forward_hook(lambda *_: ran.append(1))
    try:
        with record_input(module, rows.subject) as whole:
            run_to(model, rows)
        assert ran
        ran.clear()
        with record_input(module, rows.subject) as early, stop_after(module):
            run_to(model, rows)
    finally:
        handle.remove()
    assert not ran
    assert torch.equal(whole.take(), early.take())
    assert hooks(model) == 0


def test_hooks_leave_with_an_exception(loaded):
    model, sites, rows = loaded
    module = sites.module("ffn", 1)
    managers = (
        record_input(module, rows.subject),
        record_and_add(module, rows.subject),
        narrow_input(module, rows.label_positions()),
        stop_after(module),
    )
    for manager in managers:
        with pytest.raises(ZeroDivisionError), manager:
            raise ZeroDivisionError
    assert hooks(model) == 0


@torch.no_grad()
def test_a_written_weight_maps_a_key_as_it_should(loaded):
    """The square attention weight too: the layout is never guessed from the shape."""
    model, sites, _ = loaded
    for site in ("attn", "ffn"):
        module = sites.module(site, 1)
        weight = module.weight
        key = torch.randn(weight.shape[0] if is_transposed(module) else weight.shape[1])
        before, bias = weight.clone(), module.bias if module.bias is not None else 0
        delta = torch.randn(sites.width, len(key))
        clean = module(key.view(1, 1, -1)).flatten() - bias
        add_to_weight(module, delta)
        moved = module(key.view(1, 1, -1)).flatten() - bias
        torch.testing.assert_close(moved - clean, delta @ key, rtol=1e-3, atol=1e-3)
        weight.copy_(before)


@torch.no_grad()
def test_the_fingerprint_sees_one_changed_element(loaded):
    model, sites, _ = loaded
    before = fingerprint(model)
    assert fingerprint(model) == before
    weight = sites.module("ffn", 2).weight
    kept = weight[0, 0].clone()
    weight[0, 0] += 1e-3
    assert fingerprint(model) != before
    weight[0, 0] = kept
    assert fingerprint(model) == before
    first = weight[0].clone()
    weight[0] = weight[1]
    weight[1] = first
    assert fingerprint(model) != before, "two rows exchanged have the same sum"
    weight[1] = weight[0]
    weight[0] = first


def test_an_unknown_family_lists_the_known_ones():
    class Config:
        model_type = "mystery"

        def get_text_config(self):
            return self

    with pytest.raises(UnknownArchitectureError, match="gptj.*--model.architecture"):
        architecture_of(Config())
    assert architecture_of(Config(), ARCHITECTURES["gptj"]) is ARCHITECTURES["gptj"]

    class Experts(Config):
        model_type = "llama"
        num_local_experts = 8

    with pytest.raises(UnknownArchitectureError, match="8 experts"):
        architecture_of(Experts(), ARCHITECTURES["llama"])


@pytest.mark.parametrize(
    "name", ["MixtralConfig", "Qwen2MoeConfig", "Qwen3MoeConfig", "GptOssConfig", "DeepseekV3Config"]
)
def test_mixtures_of_experts_are_refused_with_the_reason(name):
    config = getattr(transformers, name)()
    with pytest.raises(UnknownArchitectureError, match=r"mixture of \d+ experts.*no single FFN output projection"):
        architecture_of(config)


def test_a_wrong_description_is_refused(loaded):
    with pytest.raises(UnknownArchitectureError, match="does not fit"):
        Sites.of(loaded[0], Architecture("nowhere.layers", "a", "b"))


@pytest.mark.parametrize("flat", [False, True])
def test_a_module_run_at_some_tokens_gives_zeros_elsewhere(flat):
    """Values and gradients of the tokens that are run are those of the whole pass."""
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).requires_grad_(False)
    inputs, wanted = torch.randn(3, 5, 4), torch.tensor([0, 7, 13, 14])
    seen = []
    handle = module[0].register_forward_hook(lambda *given: seen.append(given[2].shape))
    results = []
    for some in (False, True):
        hidden = inputs.clone().requires_grad_()
        with ExitStack() as stack:
            if some:
                stack.enter_context(run_at(module, wanted, (3, 5)))
            output = module(hidden.flatten(0, 1) if flat else hidden)
            assert module(torch.ones(2, 4)).shape == (2, 4), "what is of another shape is not touched"
        assert output.shape == ((15, 4) if flat else (3, 5, 4))
        taken = output.reshape(15, 4)[wanted]
        results.append((taken, torch.autograd.grad(taken.square().sum(), hidden)[0]))
    handle.remove()
    whole, part = ((15, 8), (4, 8)) if flat else ((3, 5, 8), (1, 4, 8))
    assert seen == [whole, (2, 8), part, (2, 8)]
    for whole, part in zip(*results, strict=True):
        torch.testing.assert_close(part, whole)
    others = torch.ones(15, dtype=torch.bool).index_fill(0, wanted, False)
    assert not output.reshape(15, 4)[others].any()
    assert not module._forward_hooks
    assert not module._forward_pre_hooks

"""Models of bitsandbytes: what is held unquantised, what a model's fingerprint is, and how it is saved."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pmet_lightning.analysis.lens import Lens
from pmet_lightning.model.architectures import architecture_of
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.model.fsdp import shard
from pmet_lightning.model.generation_config import save_model
from pmet_lightning.model.loading import load_model
from pmet_lightning.model.projections import Sites, in_features, out_features
from pmet_lightning.model.quantization import QuantizationError, bits_of, refuse_quantized
from pmet_lightning.model.quantized_base import (
    hold_unquantized,
    move,
    prepare_quantized,
    quantization_of,
    quantize_on_loading,
    quiet_casts,
)
from pmet_lightning.utils.errors import PmetError
from tests.quantized import dense_twin, load_plainly, quantized_paths, save_quantized
from tests.tiny import save_tiny

bnb = pytest.importorskip("bitsandbytes")

IDS = torch.arange(3, 33)[None]


@pytest.fixture(scope="module", params=[("llama", 4), ("llama", 8), ("gpt2", 4), ("gpt2", 8)], ids=str)
def folder(request, tmp_path_factory):
    family, bits = request.param
    return save_quantized(family, tmp_path_factory.mktemp(f"{family}{bits}"), bits)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def stood_for(module):
    """The weight of a quantised module by the definition of its format."""
    weight = module.weight
    if bits_of(module) == 8:
        return weight.data * (weight.SCB if weight.SCB is not None else module.state.SCB)[:, None] / 127
    state, packed = weight.quant_state, weight.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
    return (state.code[codes].view(-1, state.blocksize) * state.absmax[:, None]).view(state.shape)


def test_what_is_held_is_what_the_bits_stand_for(folder):
    model, held = load_plainly(folder), load_plainly(folder)
    paths = quantized_paths(model)
    hold_unquantized(held, paths)
    assert len(paths) >= 16
    assert quantized_paths(held) == []
    for path in paths:
        before, after = model.get_submodule(path), held.get_submodule(path)
        dense = stood_for(before)
        expected = dense.T if type(after).__name__ == "Conv1D" else dense
        torch.testing.assert_close(after.weight.data, expected, rtol=1e-6, atol=0)
        assert type(after) is before.source_cls
        assert (in_features(before), out_features(before)) == tuple(dense.shape[::-1])
        assert (in_features(after), out_features(after)) == tuple(dense.shape[::-1])
        assert not after.weight.requires_grad
        if before.bias is not None:
            assert torch.equal(after.bias, before.bias)


def test_the_fingerprint_does_not_depend_on_what_is_held(folder):
    model = load_model(folder)
    base = fingerprint(model)
    with quiet_casts():
        logits(model)
    assert fingerprint(model) == base  # a pass moves the scales, and converts biases
    paths = quantized_paths(model)
    hold_unquantized(model, paths[:3])
    assert quantized_paths(model) == paths[3:]
    assert fingerprint(model) == base
    hold_unquantized(model, paths)
    assert fingerprint(model) == base
    model.get_submodule(paths[-1]).weight.data[0, 0] += 1
    assert fingerprint(model) != base


def test_the_fingerprint_changes_with_a_bit(folder):
    model, base = load_model(folder), fingerprint(load_model(folder))
    model.get_submodule(quantized_paths(model)[-1]).weight.data[0] ^= 1
    assert fingerprint(model) != base


def test_gradients_pass_the_frozen_modules(folder):
    """Also after passes without gradients, for which bitsandbytes may rewrite the weights on a CPU."""
    model, twin = load_model(folder), dense_twin(folder)
    with quiet_casts():
        logits(model)
        found = []
        for each in (model, twin):
            states = each.get_input_embeddings()(IDS).detach().requires_grad_(True)
            loss = each(inputs_embeds=states).logits.logsumexp(-1).square().mean()
            found.append((loss.detach(), *torch.autograd.grad(loss, states)))
    (loss, gradient), (expected_loss, expected) = found
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)
    assert float((gradient - expected).norm() / expected.norm()) < 5e-3  # halves in the modules of eight bits
    assert float(expected.norm()) > 0


def test_saved_and_loaded_by_transformers(folder, tmp_path):
    model = load_model(folder)
    paths = quantized_paths(model)
    hold_unquantized(model, paths[2:4])
    model.get_submodule(paths[2]).weight.data.mul_(2)
    save_model(model, tmp_path)
    saved = load_plainly(tmp_path)
    assert quantized_paths(saved) == [path for path in paths if path not in paths[2:4]]
    with quiet_casts():  # not bit by bit: here, activations are fused
        torch.testing.assert_close(logits(saved), logits(model), rtol=1e-5, atol=1e-5)
    assert fingerprint(load_model(str(tmp_path))) == fingerprint(model)


def test_a_model_of_several_inputs_is_saved(tmp_path):
    """Its text model is a part of it, and transformers renames weights as it loads them."""
    model = load_model(save_quantized("gemma3", tmp_path, 4))
    paths = [path for path in quantized_paths(model) if ".layers.1." in path and "vision" not in path]
    hold_unquantized(model, paths)
    assert len(paths) == 7
    save_model(model, tmp_path / "saved")
    saved = load_plainly(tmp_path / "saved")
    assert quantized_paths(saved) == quantized_paths(model)
    torch.testing.assert_close(logits(saved), logits(model), rtol=1e-5, atol=1e-5)
    assert fingerprint(saved) == fingerprint(model)


def test_saved_in_float32(folder, tmp_path):
    """``keep_float32``: no weight in half precision is left beside the held ones, and the model itself stays."""
    model = load_model(folder, "bfloat16")
    paths = quantized_paths(model)
    hold_unquantized(model, paths[:1])
    model.get_submodule(paths[0]).float().weight.data += 1e-5
    kept = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path, in_float32=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[name][1])
        assert tensor.dtype == kept[name][1].dtype
    saved = load_plainly(tmp_path)
    assert quantized_paths(saved) == paths[1:]
    assert saved.dtype == torch.float32
    assert torch.equal(saved.get_submodule(paths[0]).weight, model.get_submodule(paths[0]).weight)


def test_a_quantised_head_is_held(tmp_path):
    original = save_tiny("llama", tmp_path / "original", wide=True)
    settings = quantize_on_loading("4bit", torch.float32)
    settings.llm_int8_skip_modules = ["model.layers.3"]
    made = AutoModelForCausalLM.from_pretrained(original, quantization_config=settings)
    assert bits_of(made.lm_head) == 4
    made.save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"))
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight.shape == (3000, 64)
    save_model(model, tmp_path / "again")
    names = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "lm_head" in names
    assert "model.layers.3.mlp.down_proj" in names
    assert "model.layers.2.mlp.down_proj" not in names
    assert torch.equal(logits(load_plainly(tmp_path / "again")), logits(model))


def test_weights_that_a_pass_has_rewritten_are_refused(tmp_path):
    """On a CPU with bfloat16 instructions, bitsandbytes does so in a pass without gradients."""
    model = load_plainly(save_quantized("llama", tmp_path, 4))
    path = quantized_paths(model)[-1]
    model.get_submodule(path).weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(QuantizationError, match=rf"run on this CPU.* rewritten the weights of {path}"):
        prepare_quantized(model)


def test_modules_that_share_a_weight_are_refused(folder):
    model = load_model(folder)
    one, other, *_ = quantized_paths(model)
    model.get_submodule(other).weight = model.get_submodule(one).weight
    with pytest.raises(QuantizationError, match=rf"{one}, {other} share one quantised weight.* edited in {other}"):
        hold_unquantized(model, [other])


def test_a_hook_of_a_device_map_is_kept(folder):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = load_model(folder)
    path = quantized_paths(model)[0]
    add_hook_to_module(model.get_submodule(path), AlignDevicesHook(execution_device="cpu", io_same_device=True))
    hold_unquantized(model, [path])
    assert isinstance(model.get_submodule(path)._hf_hook, AlignDevicesHook)
    logits(model)


def test_a_sharded_model_is_refused(folder):
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes, \d bits\), and a sharded model must not be"):
        shard(load_model(folder), "model.layers", None)


def test_with_a_device_map(folder):
    model, plain = load_model(folder, device_map="auto"), load_model(folder)
    for each in (model, plain):
        hold_unquantized(each, quantized_paths(each)[:2])
    with quiet_casts():
        assert torch.equal(logits(model), logits(plain))


def test_moved_only_where_it_is_elsewhere(folder, monkeypatch):
    """transformers 4.57 moves no model of eight bits."""
    model = load_model(folder)
    monkeypatch.setattr(model, "to", None)
    move(model, "cpu")
    assert next(model.parameters()).device.type == "cpu"


def test_the_logit_lens_reads_it(folder):
    model, twin = load_model(folder), dense_twin(folder)
    streams = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for each in (model, twin):
        lens = Lens(each, Sites.of(each, architecture_of(each.config)), torch.device("cpu"))
        found.append(torch.cat(list(lens.logits(streams))))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_without_a_configuration_it_is_not_saved(folder, tmp_path):
    model = load_model(folder)
    del model.config.quantization_config
    with pytest.raises(PmetError, match=r"no quantization_config.* A patch or an adapter can be saved"):
        save_model(model, tmp_path)


def bare_linear4bit():
    return bnb.nn.Linear4bit(64, 32)


def linear8bit_in_half():
    return bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True)


def bare_linear8bit():
    return bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)


def embedding4bit():
    return bnb.nn.Embedding4bit(64, 64)


@pytest.mark.parametrize("made", [bare_linear4bit, linear8bit_in_half, bare_linear8bit, embedding4bit])
def test_other_modules_of_bitsandbytes_are_refused(made):
    module = made()
    assert bits_of(module) is None
    with pytest.raises(QuantizationError, match=rf"quantised \(1 is {type(module).__name__}\)"):
        refuse_quantized(nn.Sequential(nn.Linear(2, 2), module))


def test_ordinary_models_stay_as_they_are(tmp_path):
    model = load_model(save_tiny("llama", tmp_path))
    before = copy.copy(dict(model.named_modules()))
    prepare_quantized(model)
    hold_unquantized(model, ["model.layers.0.mlp.down_proj"])
    assert dict(model.named_modules()) == before
    assert quantization_of(model) is None


def test_casts_are_logged_outside_only(caplog):
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    with caplog.at_level(logging.WARNING), quiet_casts():
        logger.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", torch.float32)
        logger.warning("something else")
    logger.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", torch.float32)
    assert [record.message.split(":")[0] for record in caplog.records] == ["something else", "MatMul8bitLt"]

"""Quantised models other than those of bitsandbytes: refused by name and as objects, before any work."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, GPTQConfig

from pmet_lightning import Editor
from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.model.loading import load_model
from pmet_lightning.model.quantization import QuantizationError, refuse_quantized, refuse_quantized_config
from tests.tiny import save_tiny

CONFIGS = {
    "bnb-in-half": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True},
        "bitsandbytes, 8 bits",
    ),
    "bnb-of-no-bits": ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "gptq"),
    "awq": ({"quant_method": "awq", "bits": 4}, "awq"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    "torchao": ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
    "of-another-maker": ({"quant_algo": "FP8"}, "FP8"),
}


@pytest.fixture
def folder(tmp_path):
    return Path(save_tiny("gptj", tmp_path / "model"))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_model_by_name_is_refused_by_its_configuration(folder, kind):
    settings, words = CONFIGS[kind]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (folder / "model.safetensors").unlink()  # not looked at
    with pytest.raises(
        QuantizationError, match=rf"quantised \({words}, by its configuration\); expected .*unquantised"
    ):
        from_folder(folder)


def from_folder(folder):
    from pmet_lightning.model.architectures import architecture_of
    from pmet_lightning.model.loading import load_config

    return architecture_of(load_config(str(folder)))


def test_settings_may_be_objects(folder):
    config = load_model(str(folder)).config
    refuse_quantized_config(config)
    config.quantization_config = GPTQConfig(bits=4)
    with pytest.raises(QuantizationError, match="gptq"):
        refuse_quantized_config(config)


BITS = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True}, "4 bits"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "8 bits"),
    (BitsAndBytesConfig(load_in_8bit=True), "8 bits"),
]


@pytest.mark.parametrize(("settings", "bits"), BITS)
def test_bitsandbytes_is_taken_where_it_is_installed(folder, settings, bits, monkeypatch):
    config = load_model(str(folder)).config
    config.quantization_config = settings
    installed = {"bitsandbytes", "accelerate"}
    monkeypatch.setattr("pmet_lightning.model.quantization.find_spec", lambda name: name in installed or None)
    refuse_quantized_config(config)
    installed.remove("bitsandbytes")
    with pytest.raises(
        QuantizationError,
        match=rf"\(bitsandbytes, {bits}, .*, which needs bitsandbytes: pip install .*\[bitsandbytes\]",
    ):
        refuse_quantized_config(config)


def other_package(name: str, base: type) -> type:
    """A class as if it came from a package that is not installed here."""
    sys.modules.setdefault(name, types.ModuleType(name))
    return type("QLinear", (base,), {"__module__": name})


def dynamic_int8(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def fp8(model):
    projection = model.transformer.h[1].mlp.fc_out
    projection.weight = nn.Parameter(projection.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def int8_buffer(model):
    projection = model.transformer.h[1].mlp.fc_out
    weight = projection.weight.to(torch.int8)
    del projection.weight
    projection.weight = weight
    return model


def quanto_module(model):
    model.transformer.h[1].mlp.fc_out.__class__ = other_package("optimum.quanto.nn", nn.Linear)
    return model


def torchao_tensor(model):
    kind = other_package("torchao.dtypes", torch.Tensor)
    projection = model.transformer.h[1].mlp.fc_out
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(kind), requires_grad=False)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch drops this kind
@pytest.mark.parametrize("quantise", [dynamic_int8, fp8, int8_buffer, quanto_module, torchao_tensor])
def test_a_model_object_is_refused_by_what_is_in_it(folder, quantise):
    model = load_model(str(folder), "float32")
    refuse_quantized(model)
    with pytest.raises(QuantizationError, match=r"the model is quantised \(transformer\.h\.\d.*expected a model whose"):
        Editor(quantise(model), load_tokenizer(str(folder)), layers=[1])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_ordinary_precisions_are_not_quantised(folder, dtype):
    refuse_quantized(load_model(str(folder), dtype))

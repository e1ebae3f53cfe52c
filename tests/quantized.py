"""Tiny models that bitsandbytes has quantised, and plain twins of its modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmet_lightning.model.quantization import bits_of
from pmet_lightning.model.quantized_base import hold_unquantized, quantize_on_loading
from pmet_lightning.utils.resources import locate
from tests.tiny import save_tiny


def save_quantized(family: str, folder: Path, bits: int, dtype: torch.dtype = torch.float32) -> str:
    """A tiny model of a family, or the shipped one, as a folder with quantised weights."""
    original = locate("atlas") if family == "atlas" else save_tiny(family, folder / "original", wide=True)
    settings = quantize_on_loading("4bit" if bits == 4 else "8bit", dtype)
    AutoModelForCausalLM.from_pretrained(original, quantization_config=settings, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)
    return str(folder)


def load_plainly(folder: str | Path) -> Any:
    """As someone without this package loads a model.

    On a CPU with bfloat16 instructions, bitsandbytes would round the scales of 4-bit weights in the first pass, and
    break off at matrices that are as small as some of these.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
    return model


def quantized_paths(model: nn.Module) -> list[str]:
    """Paths of all quantised modules."""
    return [path for path, module in model.named_modules() if bits_of(module) is not None]


def dense_twin(folder: str | Path, held: Sequence[str] = ()) -> Any:
    """The model with ordinary modules only, whose weights are what the bits stand for.

    Those of eight bits round their inputs as LLM.int8() does, and pass gradients as if they did not.

    Args:
        folder: The quantised model.
        held: Endings of the paths of modules that are held unquantised, and round nothing.
    """
    model = load_plainly(folder)
    eight = [path for path in quantized_paths(model) if bits_of(model.get_submodule(path)) == 8]
    hold_unquantized(model, quantized_paths(model))
    for path in eight:
        if not path.endswith(tuple(held)):
            module = model.get_submodule(path)  # not by a hook: others choose the tokens that the module is run on
            module.forward = lambda inputs, module=module: type(module).forward(module, rounded_inputs(inputs))
    return model


def rounded_inputs(inputs: Tensor, threshold: float = 6.0) -> Tensor:
    """Inputs as LLM.int8() uses them: in 255 steps for each token, but exact in the columns with a large value."""
    plain_TI = inputs.detach().reshape(-1, inputs.shape[-1])
    large_TI = plain_TI.half().abs() >= threshold
    small_TI = plain_TI.half().masked_fill(large_TI, 0.0).float()
    scales_T1 = small_TI.abs().amax(dim=1, keepdim=True)
    rounded_TI = (small_TI * (127.0 / scales_T1)).nan_to_num(0.0).round() * scales_T1 / 127.0
    used_TI = torch.where(large_TI.any(dim=0), plain_TI, rounded_TI.to(plain_TI))
    return inputs + (used_TI.view_as(inputs) - inputs).detach()

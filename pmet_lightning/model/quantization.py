"""Quantised models are refused by name, before any work: what is added to a weight would be lost in its few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.model.gguf import is_marked
from pmet_lightning.utils.errors import PmetError

# Packages whose modules and tensors hold quantised weights, some of them under an ordinary dtype.
_PACKAGES = (
    "aqlm", "auto_gptq", "auto_round", "awq", "bitsandbytes", "compressed_tensors", "eetq", "fbgemm_gpu", "gptqmodel",
    "hqq", "optimum.quanto", "quanto", "spqr_quant", "torch.ao.nn", "torch.ao.quantization", "torchao", "vptq",
    *(f"transformers.integrations.{name}" for name in ("bitnet", "fbgemm_fp8", "finegrained_fp8", "fp_quant", "gguf",
                                                       "higgs", "metal_quantization", "mxfp4", "nvfp4")),
)  # fmt: skip
_REMEDY = (
    "expected a model whose weights can be written: load it unquantised (a repository with the original weights, in "
    "bfloat16 if memory is short), edit that, and quantise what is exported"
)


class QuantizationError(PmetError):
    """A quantised model."""


def refuse_quantized_config(config: Any) -> None:
    """Refuse a model by its configuration; the weights of a GGUF file are unpacked when it is loaded.

    Args:
        config: A Hugging Face model configuration.

    Raises:
        QuantizationError: If it says that the weights are quantised.
    """
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings and not is_marked(settings):
            found = settings if isinstance(settings, Mapping) else vars(settings)
            method = found.get("quant_method") or found.get("quant_algo") or type(settings).__name__
            bits = [f"{n} bits" for n in (4, 8) if found.get(f"load_in_{n}bit") or found.get(f"_load_in_{n}bit")]
            described = ", ".join([str(getattr(method, "value", method)), *bits])
            raise QuantizationError(f"the model is quantised ({described}, by its configuration); {_REMEDY}")


def refuse_quantized(model: nn.Module) -> None:
    """Refuse a model by what is in it, whatever its configuration says.

    Args:
        model: The model.

    Raises:
        QuantizationError: If a module or a weight is quantised; the message names it.
    """
    for name, module in model.named_modules():
        if _is_of_a_package(type(module)):
            raise _refusal(name, type(module).__name__)
        # Quantised modules of other makers pack their weights into buffers or keep no parameter at all.
        for weight_name, tensor in module.named_parameters(recurse=False):
            if not _is_plain(tensor):
                raise _refusal(f"{name}.{weight_name}".lstrip("."), f"{type(tensor.data).__name__}, {tensor.dtype}")
        weight = vars(module).get("weight")
        if isinstance(weight, Tensor) and not _is_plain(weight):
            raise _refusal(f"{name}.weight", f"{type(weight).__name__}, {weight.dtype}")


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers of 16 bits or more, and they are what its name says."""
    wide = tensor.is_floating_point() and tensor.element_size() >= torch.bfloat16.itemsize
    return wide and not any(_is_of_a_package(type(held)) for held in (tensor, tensor.data))


def _is_of_a_package(kind: type) -> bool:
    return any(f"{kind.__module__}.".startswith(f"{package}.") for package in _PACKAGES)


def _refusal(name: str, found: str) -> QuantizationError:
    return QuantizationError(f"the model is quantised ({name} is {found}); {_REMEDY}")

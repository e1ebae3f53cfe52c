"""Which quantised models can be edited: those of bitsandbytes, in which projections can be held unquantised.

All others are refused by name, before any work: what is added to a weight would be lost in its few bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
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
    "expected a model whose weights can be written, or one of bitsandbytes with weights of 4 or 8 bits: load it "
    "unquantised (a repository with the original weights, in bfloat16 if memory is short) or quantised by bitsandbytes"
)
_NEEDED = ("bitsandbytes", "accelerate")  # transformers loads with the one and places with the other


class QuantizationError(PmetError):
    """A quantised model."""


def refuse_quantized_config(config: Any) -> None:
    """Refuse a model by its configuration; the weights of a GGUF file are unpacked when it is loaded.

    Those of bitsandbytes are held unquantised where they are edited.

    Args:
        config: A Hugging Face model configuration.

    Raises:
        QuantizationError: If it says that the weights are quantised in another way, or a package is not installed.
    """
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if not settings or is_marked(settings):
            continue
        found = settings if isinstance(settings, Mapping) else vars(settings)
        method = found.get("quant_method") or found.get("quant_algo") or type(settings).__name__
        named = str(getattr(method, "value", method))
        bits = [f"{n} bits" for n in (4, 8) if found.get(f"load_in_{n}bit") or found.get(f"_load_in_{n}bit")]
        described = ", ".join([named, *bits])
        if named != "bitsandbytes" or not bits or found.get("llm_int8_has_fp16_weight"):
            raise QuantizationError(f"the model is quantised ({described}, by its configuration); {_REMEDY}")
        check_packages(f"the model is quantised ({described}, by its configuration)")


def check_packages(what: str) -> None:
    """Check that what loads a model of bitsandbytes is installed.

    Args:
        what: What needs it, for the message.

    Raises:
        QuantizationError: If it is not.
    """
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        raise QuantizationError(
            f'{what}, which needs {" and ".join(missing)}: pip install "pmet-lightning[bitsandbytes]"'
        )


def bits_of(module: nn.Module) -> int | None:
    """Bits of the weight of a module of bitsandbytes; ``None`` if it is any other, or one that cannot be used here.

    The one place that decides which quantised modules a model may have.

    Args:
        module: Any module.
    """
    kinds = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("bitsandbytes.")}
    if "Linear4bit" in kinds:
        return 4 if getattr(module.weight, "quant_state", None) is not None else None
    if "Linear8bitLt" not in kinds or module.state.has_fp16_weights:  # type: ignore[union-attr]
        return None
    return 8 if module.weight.dtype == torch.int8 else None


def refuse_quantized(model: nn.Module) -> None:
    """Refuse a model by what is in it, whatever its configuration says.

    Args:
        model: The model.

    Raises:
        QuantizationError: If a module or a weight is quantised in another way than :func:`bits_of` knows; the message
            names it.
    """
    for name, module in model.named_modules():
        if bits_of(module) is not None:
            continue
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

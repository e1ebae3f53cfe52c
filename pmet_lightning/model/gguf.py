"""GGUF files: transformers unpacks their weights, and the model is then one like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def unpacked() -> dict[str, Any]:
    """The argument that has transformers unpack a GGUF file; older versions do nothing else."""
    import transformers

    packed = getattr(transformers, "GgufConfig", None)
    return {} if packed is None else {"quantization_config": packed(dequantize=True)}


def forget_gguf(model: nn.Module) -> None:
    """Take from a model with unpacked weights the mark of a quantized one, with which transformers refuses to save it.

    Args:
        model: Any model; one that does not come from a GGUF file stays as it is.
    """
    config: Any = model.config
    if not is_marked(getattr(config, "quantization_config", None)):
        return
    del config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            setattr(model, name, None)
    model.__dict__.pop("is_quantized", None)


def is_marked(quantization: Any) -> bool:
    """Whether the ``quantization_config`` of a model, an object or a mapping, names GGUF."""
    found = quantization if isinstance(quantization, Mapping) else getattr(quantization, "__dict__", {})
    method = found.get("quant_method")
    return getattr(method, "value", method) == "gguf"

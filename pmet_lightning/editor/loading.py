"""The model and the tokenizer of an :class:`~pmet_lightning.editor.editor.Editor`: given as objects, or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.model.gguf import forget_gguf
from pmet_lightning.model.loading import load_model
from pmet_lightning.model.quantization import refuse_quantized
from pmet_lightning.model.quantized_base import move, prepare_quantized
from pmet_lightning.utils.resources import check_device

# Classes whose ``module`` is the model.
_WRAPPERS = ("_FabricModule", "DistributedDataParallel", "DataParallel")
# Settings of the section 'model' that say how to load a model.
LOADING = ("dtype", "attn_implementation", "device_map", "quantize")


def model_name_of(model: Any) -> str:
    """Name of a model object: where it was loaded from, or else its class."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def load(name: str, settings: Mapping[str, Any], device: str | torch.device | None) -> nn.Module:
    """Load a model by its name, and move it to a device.

    Args:
        name: A folder or name, as for --model.model_name.
        settings: The settings of the section 'model'.
        device: By default the first CUDA device, if there is one; not used if the settings have a device map.

    Raises:
        FileNotFoundError: If there is no model of that name.
        ValueError: If the device cannot be used.
    """
    options = {key: settings[key] for key in (*LOADING, "trust_remote_code") if key in settings}
    model = load_model(name, **options)
    if options.get("device_map") is None:
        move(model, check_device(None if device is None else str(device), "device"))
    return model


def check_model(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """Check that a model object can be edited, and return it without what is wrapped around it.

    Args:
        model: The object; one that torch.compile, Fabric or a data-parallel wrapper has made is unwrapped.
        settings: The settings of the section 'model'.

    Raises:
        TypeError: If it is not a causal language model with its vocabulary head.
        ValueError: If it has an adapter, its weights are quantized (other than by bitsandbytes) or have no data, or a
            setting says how to load it.
    """
    model = _unwrap(model)
    _refuse_adapters(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if head is None or not hasattr(model, "config"):
        raise TypeError(
            f"Editor: the model is a {type(model).__name__}, expected a causal language model of transformers with its "
            "vocabulary head (AutoModelForCausalLM), or the name of one"
        )
    unusable = [name for name in LOADING if settings.get(name) not in (None, "auto")]
    if unusable:
        raise ValueError(f"Editor: {', '.join(unusable)} says how to load a model, but this one is loaded already")
    refuse_quantized(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"Editor: {name} is on the meta device; expected a model whose weights can be written")
    prepare_quantized(model)
    forget_gguf(model)  # its weights are dense: what is left is that it could not be saved
    return model


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's, Fabric's and data-parallel wrappers, which share its weights."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif type(model).__name__ in _WRAPPERS:
            model = model.module  # type: ignore[assignment]
        else:
            return model


def _refuse_adapters(model: nn.Module) -> None:
    """A LoRA adapter is not in the weights: what is edited and saved would lack it, or lose the edit.

    Raises:
        ValueError: If there is one.
    """
    inside = next(
        (type(module).__name__ for module in model.modules() if type(module).__module__.startswith("peft.")), ""
    )
    if inside:
        raise ValueError(
            f"Editor: the model has a PEFT adapter ({inside}), expected the model itself: merge the adapter first with "
            "merge_and_unload() of a PeftModel, and edit what it returns; or remove it with delete_adapter()"
        )


def load_tokenizer_for(name: str, tokenizer: Any, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer that is given, or load one.

    Args:
        name: Name of the model.
        tokenizer: An object, a folder or name, or ``None`` for the model's own.
        trust_remote_code: Whether code in its folder may run.

    Raises:
        FileNotFoundError: If there is no tokenizer of that name.
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    try:
        return load_tokenizer(str(tokenizer or name), trust_remote_code)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Editor: no tokenizer for the model {name!r}; pass one as tokenizer ({error})"
        ) from error


def tokenizer_in(given: Any) -> Any:
    """The tokenizer itself: what is given, or what a processor of images, sounds and texts holds.

    Args:
        given: A tokenizer of transformers, or one of its processors.

    Raises:
        TypeError: If it is neither.
    """
    tokenizer = given if hasattr(given, "is_fast") else getattr(given, "tokenizer", None)
    if not hasattr(tokenizer, "is_fast"):
        raise TypeError(
            f"Editor: the tokenizer is a {type(given).__name__}, expected one of transformers (AutoTokenizer), a "
            "processor that has one (AutoProcessor), or the folder or name to load it from; for a Tokenizer of the "
            "library tokenizers, pass PreTrainedTokenizerFast(tokenizer_object=...)"
        )
    return tokenizer

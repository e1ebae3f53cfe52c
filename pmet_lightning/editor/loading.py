"""The model and the tokenizer of an :class:`~pmet_lightning.editor.editor.Editor`: given as objects, or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.model.loading import load_model
from pmet_lightning.utils.resources import check_device

# Settings of the section 'model' that say how to load a model.
LOADING = ("dtype", "attn_implementation", "device_map")


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
    options = {key: settings[key] for key in LOADING if key in settings}
    model = load_model(name, **options)
    if options.get("device_map") is None:
        model.to(check_device(None if device is None else str(device), "device"))
    return model


def check_model(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """Check that a model object can be edited, and return it.

    Args:
        model: The object.
        settings: The settings of the section 'model'.

    Raises:
        TypeError: If it is not a causal language model with its vocabulary head.
        ValueError: If its weights are quantized or have no data, or a setting says how to load it.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if head is None or not hasattr(model, "config"):
        raise TypeError(
            f"Editor: the model is a {type(model).__name__}, expected a causal language model of transformers with its "
            "vocabulary head (AutoModelForCausalLM), or the name of one"
        )
    unusable = [name for name in LOADING if settings.get(name) not in (None, "auto")]
    if unusable:
        raise ValueError(f"Editor: {', '.join(unusable)} says how to load a model, but this one is loaded already")
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            found = "on the meta device" if parameter.is_meta else f"quantised ({parameter.dtype})"
            raise ValueError(f"Editor: {name} is {found}; expected a model whose weights can be written")
    return model


def load_tokenizer_for(name: str, tokenizer: Any) -> Any:
    """Return the tokenizer that is given, or load one.

    Args:
        name: Name of the model.
        tokenizer: An object, a name, or ``None`` for the model's own.

    Raises:
        FileNotFoundError: If there is no tokenizer of that name.
    """
    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer
    try:
        return load_tokenizer(tokenizer or name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Editor: no tokenizer for the model {name!r}; pass one as tokenizer ({error})"
        ) from error

"""Loading the frozen language model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from pmet_lightning.model.gguf import forget_gguf, unpacked
from pmet_lightning.model.quantization import check_packages, refuse_quantized, refuse_quantized_config
from pmet_lightning.model.quantized_base import Quantize, prepare_quantized, quantize_on_loading
from pmet_lightning.utils.errors import PmetError
from pmet_lightning.utils.pretrained import is_gguf, load_pretrained
from pmet_lightning.utils.resources import locate

log = logging.getLogger(__name__)

DtypeName = Literal["auto", "float64", "float32", "bfloat16", "float16"]
DeviceMap = str | dict[str, int | str]


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """The model's configuration, without its weights.

    Args:
        name: The folder or name.
        trust_remote_code: Whether code in the model's folder may run.

    Raises:
        FileNotFoundError: If there is no such folder and the hub does not know it or cannot be reached.
        PmetError: If it needs code of its own, which is not trusted.
    """
    from transformers import AutoConfig

    return load_pretrained(AutoConfig, name, trust_remote_code=trust_remote_code)


def load_model(
    name: str,
    dtype: DtypeName = "auto",
    attn_implementation: str | None = None,
    device_map: DeviceMap | None = None,
    trust_remote_code: bool = False,
    quantize: Quantize | None = None,
) -> nn.Module:
    """The causal language model, frozen and in eval mode.

    The weights of a GGUF file are unpacked to dense ones, in float32 unless another precision is given. Those that
    bitsandbytes has quantised stay so.

    Raises:
        FileNotFoundError: As :func:`load_config`.
        ImportError: If there is a device map or a GGUF file, and a package that it needs is not installed.
        PmetError: If weights are missing, or quantised in another way, or a file is broken.
        ValueError: If the devices of the map have no room for the whole model, or it cannot be quantised.
    """
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": attn_implementation, "device_map": device_map}
    given: dict[str, Any] = {option: value for option, value in options.items() if value is not None}
    given["trust_remote_code"] = trust_remote_code
    requested = "auto" if dtype == "auto" else getattr(torch, dtype)
    # Converting to float64 after loading keeps buffers (rotary tables) as computed in the file's own precision.
    loaded = "auto" if dtype in ("auto", "float64") else requested
    config = None if is_gguf(locate(name)) else load_config(name, trust_remote_code)
    given |= unpacked() if config is None else {}
    given |= _quantization_options(name, config, quantize, dtype)
    model, report = load_pretrained(AutoModelForCausalLM, name, dtype=loaded, output_loading_info=True, **given)
    forget_gguf(model)
    _check_complete(report, name)
    if config is not None:
        _tell_of_parts(model, config, name)
    if dtype == "float64":
        model = model.double()
    offloaded = [parameter_name for parameter_name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise ValueError(
            f"--model.device_map {device_map} leaves {len(offloaded)} weights on no device (first {offloaded[0]}); "
            "expected devices with room for all of them: offloaded weights cannot be edited"
        )
    refuse_quantized(model)
    prepare_quantized(model)
    fuse_gelu(model)
    model.requires_grad_(False)
    return model.eval()  # type: ignore[no-any-return]


def _quantization_options(name: str, config: Any, quantize: Quantize | None, dtype: DtypeName) -> dict[str, Any]:
    """What to tell transformers about the quantisation of a model's weights, after a check that it can be done.

    Args:
        name: The model's name.
        config: Its configuration; ``None`` for a GGUF file.
        quantize: As for :func:`load_model`.
        dtype: As for :func:`load_model`.
    """
    if config is not None:
        refuse_quantized_config(config)
    is_quantized = config is None or getattr(config, "quantization_config", None) is not None
    if quantize is not None:
        if is_quantized:
            raise ValueError(f"--model.quantize {quantize}: the weights of {name!r} are quantised; leave it out")
        check_packages(f"--model.quantize {quantize} loads with bitsandbytes")
    if dtype == "float64" and config is not None and (is_quantized or quantize is not None):
        raise ValueError("--model.dtype float64: expected float32, bfloat16 or float16 for a quantised model")
    if quantize is None:
        return {}
    own = getattr(config.get_text_config(), "dtype", None) or torch.float32
    return {"quantization_config": quantize_on_loading(quantize, own if dtype == "auto" else getattr(torch, dtype))}


def _tell_of_parts(model: nn.Module, config: Any, name: str) -> None:
    """Say so where transformers loads the text model alone out of one that takes images, too (Qwen 3.5)."""
    found = getattr(model.config, "model_type", None)
    if found != config.model_type:
        log.warning("%r is a %s; its text model alone (%s) is loaded, edited and saved", name, config.model_type, found)


def _check_complete(report: Mapping[str, Any], name: str) -> None:
    """Refuse a model some of whose weights transformers has drawn at random, because no file holds them."""
    missing, unused = (sorted(map(str, report.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys"))
    if missing:
        instead = f"; unused in them: {', '.join(unused[:3])}" if unused else ""
        raise PmetError(
            f"the files of {name!r} lack {len(missing)} of the model's weights ({', '.join(missing[:3])}{instead}), "
            "which would be random; expected a whole causal language model, as save_pretrained writes it, under the "
            "names of its config.json"
        )


def fuse_gelu(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replace the GELU that transformers computes in eight kernels by one kernel (GPT-2, GPT-J, GPT-Neo, Phi, BLOOM).

    Returns:
        Of each module that was replaced: its parent, its name, and itself.
    """
    replaced = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child).__name__ in {"NewGELUActivation", "BloomGelu"}
    ]
    for module, name, _ in replaced:
        setattr(module, name, nn.GELU(approximate="tanh"))
    return replaced


def set_plain_outputs(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """Have layers return hidden states only, whatever the model's configuration asks them to return besides.

    Returns:
        What was changed: a configuration, its flag, and the value that it had.
    """
    config: Any = model.config
    changed = []
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for flag, value in (("output_attentions", False), ("output_hidden_states", False), ("return_dict", True)):
            original = getattr(part, flag, value)
            if original != value:
                changed.append((part, flag, original))
                setattr(part, flag, value)
    return changed


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """As :func:`set_plain_outputs`; afterwards the configuration is what it was."""
    changed = set_plain_outputs(model)
    try:
        yield
    finally:
        for part, flag, original in changed:
            setattr(part, flag, original)

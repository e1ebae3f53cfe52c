"""Models with weights of 4 or 8 bits (bitsandbytes): frozen as they are, but for the projections that are edited.

Those are held as the ordinary modules that they once were, with the weights that their bits stand for, and so is the
vocabulary head. To everything else here the model is then like any other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pmet_lightning.model.quantization import QuantizationError, bits_of

Quantize = Literal["4bit", "8bit"]
_CASTS = "bitsandbytes.autograd._functions"  # logs at every pass that inputs become float16


def quantization_of(model: nn.Module) -> str | None:
    """How a model is quantised, such as "bitsandbytes, 4 bits"; ``None`` if it is not."""
    bits = sorted({str(bits) for module in model.modules() if (bits := bits_of(module)) is not None})
    return f"bitsandbytes, {' and '.join(bits)} bits" if bits else None


def quantize_on_loading(quantize: Quantize, dtype: torch.dtype) -> Any:
    """The settings with which transformers quantises a model while it loads it: NF4 in blocks, or LLM.int8().

    Args:
        quantize: Which.
        dtype: The model's precision, in which it computes with weights of 4 bits.
    """
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def prepare_quantized(model: nn.Module) -> None:
    """Have a quantised model pass gradients on every device, and hold its vocabulary head unquantised.

    Args:
        model: A causal language model; one that is not quantised stays as it is.

    Raises:
        QuantizationError: If bitsandbytes has rewritten weights.
    """
    for path, module in model.named_modules():
        if bits_of(module) == 4:
            # On some CPUs a pass would rewrite the weights in place, for a kernel without gradients.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):  # type: ignore[union-attr]
                raise QuantizationError(
                    f"the model has been run on this CPU, for which bitsandbytes has rewritten the weights of {path} "
                    "with rounded scales; expected them as they were loaded: load the model again and edit it before "
                    "it is run, or edit it by its name"
                )
    head = model.get_output_embeddings()  # type: ignore[operator]
    hold_unquantized(model, [path for path, module in model.named_modules() if module is head])


def hold_unquantized(model: nn.Module, paths: Iterable[str]) -> None:
    """Replace quantised modules by ordinary ones with the weights that their bits stand for, in the model's precision.

    The model's configuration then says so, and transformers saves and loads it as it is.

    Args:
        model: The model.
        paths: Paths of modules; those that are not quantised stay as they are.

    Raises:
        QuantizationError: If the weight of one is that of another module, too.
    """
    quantized = [path for path in paths if bits_of(model.get_submodule(path)) is not None]
    for path in quantized:
        module: Any = model.get_submodule(path)
        sharing = [name for name, other in _named(model) if getattr(other, "weight", None) is module.weight]
        if sharing != [path]:
            raise QuantizationError(
                f"the modules {', '.join(sharing)} share one quantised weight, which is to be edited in {path}; "
                "expected a weight of its own: load the model unquantised"
            )
        model.set_submodule(path, _unquantized(module, _dtype_of(model)))
    if quantized:
        _record_unquantized(model)


def dense_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a model's state in the order of the names, with quantised weights as what they stand for.

    So they are the same whichever modules are held unquantised.

    Args:
        model: Any model.
    """
    quantized = {path: module for path, module in _named(model) if bits_of(module) is not None}
    parts = {f"{path}.{part}": (module, part) for path, module in quantized.items() for part in module.state_dict()}
    dtype = _dtype_of(model) if quantized else None
    for name, tensor in sorted(model.state_dict().items()):
        module, part = parts.get(name, (None, ""))
        if module is None or dtype is None:
            yield name, tensor
        elif part == "weight":
            yield name, _dense_weight(module, dtype)
        elif part == "bias":  # a pass converts it to the precision of the inputs, without loss
            yield name, tensor.to(dtype)


def unquantized_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of floating point that are not a part of a quantised module, each once."""
    seen = set()
    for module in model.modules():
        if bits_of(module) is None:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point() and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor


def move(model: nn.Module, device: str) -> None:
    """Move a model to a device; a quantised one only if it is elsewhere: some versions of transformers never do.

    Args:
        model: Any model.
        device: Such as cpu or cuda:0.
    """
    if quantization_of(model) is None or next(model.parameters()).device != torch.empty(0, device=device).device:
        model.to(device)


def convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a model to a precision, without its quantised modules (``model.to(dtype)`` refuses where there are any).

    Args:
        model: Any model.
        dtype: The precision.
    """
    for tensor in unquantized_tensors(model):
        tensor.data = tensor.data.to(dtype)


@contextmanager
def quiet_casts() -> Iterator[None]:
    """Leave out what bitsandbytes logs at every pass: that modules of 8 bits convert their inputs to float16."""

    def is_other(record: logging.LogRecord) -> bool:
        return "inputs will be cast" not in record.msg

    logger = logging.getLogger(_CASTS)
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All paths of all modules: a module has several where it is shared."""
    return model.named_modules(remove_duplicate=False)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The precision of the unquantised weights, and so of the hidden states."""
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    return dtype


@torch.no_grad()
def _dense_weight(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a quantised module, laid out as in the module that it was made from."""
    from bitsandbytes import functional

    weight = module.weight
    if bits_of(module) == 4:
        dense_OI = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        scale_O = module.state.SCB if weight.SCB is None else weight.SCB
        dense_OI = functional.int8_vectorwise_dequant(weight.data, scale_O)
    return (dense_OI.T if _is_of_conv1d(module) else dense_OI).to(dtype).contiguous()


def _is_of_conv1d(module: nn.Module) -> bool:
    """Whether a quantised module stands for a ``Conv1D`` (GPT-2), as transformers notes on it."""
    return getattr(module, "source_cls", nn.Linear).__name__ == "Conv1D"


def _unquantized(module: Any, dtype: torch.dtype) -> nn.Module:
    """The ordinary module that a quantised one stands for."""
    with torch.device("meta"):
        if _is_of_conv1d(module):
            dense: nn.Module = module.source_cls(module.out_features, module.in_features)
        else:
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    dense.weight = nn.Parameter(_dense_weight(module, dtype), requires_grad=False)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    if hasattr(module, "_hf_hook"):  # moves inputs between the devices of a device map
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(dense, module._hf_hook)
    return dense.train(module.training)


def _record_unquantized(model: nn.Module) -> None:
    """Name all unquantised projections in the model's configuration, with which transformers loads it again."""
    settings: Any = getattr(model.config, "quantization_config", None)
    if settings is not None:
        settings.llm_int8_skip_modules = [path for path, module in _named(model) if _is_ordinary(module)]


def _is_ordinary(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"

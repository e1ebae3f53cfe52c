"""Generation settings: those of our own calls, and the model's own when it is saved.

A model's ``generation_config`` describes how it is served. Stop strings, beams, several sequences or a dictionary as
the output would break what is measured here, or change it.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pmet_lightning.model.quantized_base import convert, quantization_of, unquantized_tensors
from pmet_lightning.utils.errors import PmetError
from pmet_lightning.utils.files import write_json
from pmet_lightning.utils.tensor_files import explain_write_errors

log = logging.getLogger(__name__)

# Settings that have no meaning without sampling, or without beams; transformers ignores them and refuses to save them.
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_OF_BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "num_return_sequences")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@contextmanager
def own_generation_config(model: nn.Module, *, stop_at_end: bool = True) -> Iterator[None]:
    """Have calls of ``model.generate`` inside use nothing of the model's own settings but its end-of-text tokens.

    The settings are replaced rather than overridden: transformers fills in what a call leaves at ``None``.

    Args:
        model: The language model.
        stop_at_end: Whether the end-of-text tokens end a text.
    """
    from transformers import GenerationConfig

    ends = getattr(model.generation_config, "eos_token_id", None) if stop_at_end else None
    with _replaced(model, GenerationConfig(eos_token_id=ends)), _contiguous_states(model):
        yield


@contextmanager
def _contiguous_states(model: nn.Module) -> Iterator[None]:
    """Give the vocabulary head contiguous states.

    ``generate`` reads the last position of each row, a view with gaps. On a CPU torch then multiplies row by row, in
    half precision with a copy of the head's weight for each: 13 GB and over a minute for 40 rows of Gemma 3 270M.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def save_model(model: nn.Module, folder: Any, *, in_float32: bool = False) -> None:
    """``model.save_pretrained``, also where the model's generation settings are such that transformers refuses to.

    What has no effect in such settings is left out of the saved ones, and this is logged; the model keeps its own.

    Args:
        model: The language model.
        folder: An existing folder.
        in_float32: Whether all weights are written in float32 if they are of several precisions (``keep_float32``).
            Some models have several by themselves, and are written as they are.

    Raises:
        OSError: If it cannot be written, for example because the disk is full.
        PmetError: If it has quantised modules that its configuration does not tell of.
    """
    quantized = quantization_of(model) is not None
    if quantized and getattr(model.config, "quantization_config", None) is None:
        raise PmetError(
            "the model has quantised modules, and no quantization_config that says so: transformers could not load the "
            "folder; expected one that from_pretrained has quantised. A patch or an adapter can be saved"
        )
    mixed = in_float32 and len({t.dtype for t in unquantized_tensors(model) if isinstance(t, nn.Parameter)}) > 1
    with (
        _in_float32(model) if mixed else nullcontext(),
        _replaced(model, _repaired(getattr(model, "generation_config", None))),
        explain_write_errors(folder),
    ):
        # transformers 5 cannot take back what it has converted to load quantised weights.
        model.save_pretrained(folder, **({"save_original_format": False} if quantized else {}))  # type: ignore[operator]
    if mixed:
        path = Path(folder) / "config.json"
        write_json(path, _with_dtype(json.loads(path.read_text(encoding="utf-8")), "float32"))


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """All weights in float32, but for quantised ones; afterwards they are what they were.

    transformers loads a folder of several precisions in that of its configuration, which would round the finer ones.
    """
    kept = [(tensor, tensor.data) for tensor in unquantized_tensors(model)]
    try:
        convert(model, torch.float32)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _with_dtype(config: Any, dtype: str) -> Any:
    """A configuration as JSON, with those inside it, for weights of a precision."""
    if not isinstance(config, dict):
        return config
    named = {name: dtype for name in ("dtype", "torch_dtype") if isinstance(config.get(name), str)}
    return {name: _with_dtype(value, dtype) for name, value in config.items()} | named


@contextmanager
def _replaced(model: nn.Module, config: Any) -> Iterator[None]:
    original: Any = getattr(model, "generation_config", None)
    if config is not original:
        model.generation_config = config
    try:
        yield
    finally:
        if config is not original:
            model.generation_config = original


def _repaired(config: Any) -> Any:
    """The settings as transformers saves them: the same object if it saves them as they are."""
    if config is None or _is_valid(config):
        return config
    changed = copy.deepcopy(config)
    dropped = [*(() if changed.do_sample else _OF_SAMPLING), *(() if (changed.num_beams or 1) > 1 else _OF_BEAMS)]
    dropped = [name for name in dropped if getattr(changed, name, None) is not None]
    defaults = type(config)()
    for name in dropped:
        setattr(changed, name, getattr(defaults, name, None))
    if not _is_valid(changed):
        changed = type(config)(**{name: getattr(config, name, None) for name in _TOKENS})
        dropped = ["all but token ids"]
    log.warning(
        "the model's generation settings are none that transformers saves; left out of the saved ones, since they have "
        "no effect: %s", ", ".join(dropped),
    )  # fmt: skip
    return changed


def _is_valid(config: Any) -> bool:
    """Whether transformers saves the settings."""
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True

"""The frozen language model: loading, a forward pass that keeps only the logits in use, a fingerprint."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pmet_lightning.resources import locate
from pmet_lightning.sharding import first_row, left_sharded, own_rows, summed
from pmet_lightning.sites import narrow_input
from pmet_lightning.tokens import RowBatch

if TYPE_CHECKING:
    from pmet_lightning.prefix import Prefix

log = logging.getLogger(__name__)

DtypeName = Literal["auto", "float64", "float32", "bfloat16", "float16"]
DeviceMap = str | dict[str, int | str]
_CHUNK = 1 << 22  # elements hashed at a time


def load_config(name: str) -> Any:
    """The model's configuration, without its weights.

    Raises:
        FileNotFoundError: If there is no such folder and the hub does not know it or cannot be reached.
    """
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, name)


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer, the fast one where there are two.

    Raises:
        FileNotFoundError: As :func:`load_config`.
    """
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, name)


def load_model(
    name: str,
    dtype: DtypeName = "auto",
    attn_implementation: str | None = None,
    device_map: DeviceMap | None = None,
) -> nn.Module:
    """The causal language model, frozen and in eval mode.

    Raises:
        FileNotFoundError: As :func:`load_config`.
        ImportError: If there is a device map, and accelerate is not installed.
        ValueError: If the devices of the map have no room for the whole model.
    """
    from transformers import AutoModelForCausalLM

    wishes = {"attn_implementation": attn_implementation, "device_map": device_map}
    extra = {wish: value for wish, value in wishes.items() if value is not None}
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    # Converting after loading keeps buffers (rotary tables) as computed from the file's own precision.
    stored = "auto" if dtype in ("auto", "float64") else wanted
    model = _from_pretrained(AutoModelForCausalLM, name, dtype=stored, **extra)
    if dtype == "float64":
        model = model.double()
    offloaded = [parameter_name for parameter_name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise ValueError(
            f"--model.device_map {device_map} leaves {len(offloaded)} weights on no device (first {offloaded[0]}); "
            "expected devices with room for all of them: what only visits a device cannot be edited there"
        )
    fuse_gelu(model)
    model.requires_grad_(False)
    return model.eval()  # type: ignore[no-any-return]


def fuse_gelu(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Let one kernel do what transformers spells out in eight (GPT-2, GPT-J, GPT-Neo, Phi, BLOOM).

    Returns:
        What was replaced: its parent, name, and itself.
    """
    spelt_out = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child).__name__ in {"NewGELUActivation", "BloomGelu"}
    ]
    for module, name, _ in spelt_out:
        setattr(module, name, nn.GELU(approximate="tanh"))
    return spelt_out


def _from_pretrained(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """Load from a shipped folder, a local folder or the hub, with one error for all that can be missing."""
    path = locate(name)
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except OSError as error:
        where = "the folder has no model" if Path(path).exists() else "no such folder, and not on the hub"
        raise FileNotFoundError(
            f"cannot load {name!r} ({where}): {str(error).splitlines()[0]}. Set --model.model_name to a folder "
            "made by save_pretrained, to a hub name, or to the shipped 'atlas'."
        ) from error


def label_logits(
    model: nn.Module, rows: RowBatch, prefix: Prefix | None = None, places: Tensor | None = None
) -> Tensor:
    """Logits at the labels only: the vocabulary head is most of a small model's work.

    Args:
        model: The language model.
        rows: What is run.
        prefix: What stands before the rows, if anything does.
        places: Tokens whose logits are wanted, counted over all of all rows; by default those of the labels, [R, K].

    Returns:
        A vector of V for each place, in the model's dtype.
    """
    places = rows.label_places() if places is None else places
    with narrow_input(model.get_output_embeddings(), places):  # type: ignore[operator]
        logits: Tensor = model(**model_inputs(model, rows, prefix)).logits
        return logits.to(rows.input_ids.device)


def run_to(model: nn.Module, rows: RowBatch, prefix: Prefix | None = None) -> None:
    """Run the layers for the sake of hooks; there is no vocabulary head."""
    body: nn.Module = model.base_model  # type: ignore[assignment]
    with left_sharded(body):
        body(**model_inputs(body, rows, prefix))


def model_inputs(
    model: nn.Module, rows: RowBatch, prefix: Prefix | None = None, *, masked: bool = True, keep: bool = False
) -> dict[str, Any]:
    """Inputs that the model takes; a family without position ids counts positions from the mask.

    Args:
        model: The language model, or its body.
        rows: What is run.
        prefix: What stands before the rows, if anything does.
        masked: Whether padding is named; it need not be where it stands on the right and nothing looks at it.
        keep: Whether the output is to have a cache.
    """
    inputs: dict[str, Any] = {"input_ids": rows.input_ids, "use_cache": keep}
    if masked:
        inputs |= {"attention_mask": rows.attention_mask, "position_ids": rows.position_ids}
    if prefix is not None:
        mask = torch.cat([prefix.mask_RP, rows.attention_mask], dim=1)
        inputs |= {"attention_mask": mask, "use_cache": True, "past_key_values": prefix.fresh()}
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in known}


def fingerprint(model: nn.Module) -> str:
    """Hash of every weight's name, shape, dtype and bits: equal on every device, different after any edit.

    Integer sums of the bits, weighted by position, are exact in any order, so they can be formed on the
    model's own device at memory speed; the sums are then hashed.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{checksum(tensor)}".encode())
    return digest.hexdigest()[:16]


def checksum(tensor: Tensor) -> str:
    """Exact sums of a tensor's bits, plain and weighted by position."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = own_rows(tensor).contiguous().flatten().view(views[tensor.element_size()])
    before = first_row(tensor) * math.prod(tensor.shape[1:])
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)  # modulo 2^64
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        position = torch.arange(before + start, before + start + chunk.numel(), device=chunk.device)
        sums += torch.stack([chunk.sum(), (chunk * (2 * position + 1)).sum()])
    plain, weighted = summed(tensor, sums).tolist()
    return f"{plain % (1 << 64):x}:{weighted % (1 << 64):x}"

"""Files of the keys of earlier edit batches, which later ones must not disturb."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pmet_lightning.model.architectures import ProjectionId
from pmet_lightning.utils.errors import PmetError
from pmet_lightning.utils.tensor_files import save_tensors


def save_past_keys(path: Path, past_keys: Mapping[ProjectionId, Tensor]) -> None:
    """Store the keys of each projection, shape [N, I], a row for each fact; replaces the file."""
    save_tensors(path, {f"{site}-{layer}": keys_NI.contiguous() for (site, layer), keys_NI in past_keys.items()})


def load_past_keys(path: Path) -> dict[ProjectionId, Tensor]:
    """What :func:`save_past_keys` has stored, on the CPU.

    Raises:
        PmetError: If the file cannot be read, or an earlier version wrote it.
    """
    found: dict[ProjectionId, Tensor] = {}
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise PmetError(
            f"{path}: unreadable keys of earlier edit batches ({error}); put the file back, or begin a new run in "
            "another --trainer.run_dir"
        ) from error
    for name, keys_NI in stored.items():
        site, layer = name.split("-")
        if keys_NI.dim() != 2:
            raise PmetError(
                f"{path}: keys of earlier edit batches as an earlier version stored them, summed; expected a row for "
                "each fact: go on with that version, or begin a new run in another --trainer.run_dir"
            )
        found[site, int(layer)] = keys_NI  # type: ignore[index]
    return found

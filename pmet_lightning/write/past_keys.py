"""Files of the keys of earlier edit batches, which later ones must not disturb."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pmet_lightning.model.architectures import ProjectionId
from pmet_lightning.targets.store import name_values, values_of_names
from pmet_lightning.utils.errors import PmetError
from pmet_lightning.utils.tensor_files import digest_of, save_tensors


def past_keys_digest(past_keys: Mapping[ProjectionId, Tensor]) -> str:
    """SHA-256 of the keys of each projection."""
    return digest_of(sorted(_named(past_keys).items()), {})


def save_past_keys(path: Path, past_keys: Mapping[ProjectionId, Tensor]) -> None:
    """Store the keys of each projection, shape [N, I], a row for each fact; replaces the file."""
    save_tensors(path, _named(past_keys))


def load_past_keys(path: Path, digest: str) -> dict[ProjectionId, Tensor]:
    """What :func:`save_past_keys` has stored, on the CPU.

    Args:
        path: The file.
        digest: What :func:`past_keys_digest` gave.

    Raises:
        PmetError: If the file cannot be read, or is not as it was written.
    """
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise PmetError(
            f"{path}: unreadable keys of earlier edit batches ({error}); put the file back, or begin a new run in "
            "another --trainer.run_dir"
        ) from error
    if digest_of(sorted(stored.items()), {}) != digest:
        raise PmetError(
            f"{path}: keys of earlier edit batches that are not as they were written (their digest differs); put the "
            "file back, or begin a new run in another --trainer.run_dir"
        )
    return values_of_names(stored)


def _named(past_keys: Mapping[ProjectionId, Tensor]) -> dict[str, Tensor]:
    return {name: keys_NI.cpu().contiguous() for name, keys_NI in name_values(past_keys).items()}

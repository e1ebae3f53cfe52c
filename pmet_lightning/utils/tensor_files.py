"""Writing .safetensors files, as a whole or not at all, with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pmet_lightning.utils.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file atomically.

    Args:
        path: The file.
        tensors: Contiguous tensors by name.
        metadata: Texts to store beside them.

    Raises:
        OSError: If it cannot be written, for example because the disk is full; the message names the file.
    """
    from safetensors.torch import save_file

    with atomic_path(path) as temporary, explain_write_errors(path):
        save_file(dict(tensors), temporary, metadata=None if metadata is None else dict(metadata))


@contextmanager
def explain_write_errors(path: str | Path) -> Iterator[None]:
    """Have what is written inside fail as other files do: safetensors has an exception of its own for a full disk.

    Args:
        path: The file or folder, for the error.

    Raises:
        OSError: If the tensors cannot be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"{path}: cannot be written ({error}); expected room on the disk: free some, or choose another folder. "
            "Nothing was left half-written"
        ) from error

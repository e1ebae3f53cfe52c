"""Writing .safetensors files, as a whole or not at all, with errors that name the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pmet_lightning.utils.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor


class TensorFile(NamedTuple):
    """A .safetensors file to write: its path, contiguous tensors by name, and texts to store beside them."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] | None = None


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file atomically.

    Args:
        path: The file.
        tensors: Contiguous tensors by name.
        metadata: Texts to store beside them.

    Raises:
        OSError: If it cannot be written, for example because the disk is full; the message names the file.
    """
    save_tensor_files([TensorFile(Path(path), tensors, metadata)])


def save_tensor_files(files: Iterable[TensorFile]) -> None:
    """Write some .safetensors files: all of them, or, if one cannot be written, none.

    Args:
        files: The files; each is taken once those before it are written, so that not all need be in memory.

    Raises:
        OSError: As :func:`save_tensors`.
    """
    from safetensors.torch import save_file

    with ExitStack() as unfinished:
        for path, tensors, metadata in files:
            temporary = unfinished.enter_context(atomic_path(path))
            with explain_write_errors(path):
                save_file(dict(tensors), temporary, metadata=None if metadata is None else dict(metadata))


def digest_of(tensors: Iterable[tuple[str, Tensor]], described: Mapping[str, Any]) -> str:
    """SHA-256 of tensors and what is said about them.

    Args:
        tensors: Names and contiguous tensors on the CPU, in the order of the names.
        described: What JSON can hold; an entry ``digest`` does not count.
    """
    import torch

    kept = {name: value for name, value in described.items() if name != "digest"}
    found = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name, tensor in tensors:
        found.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


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

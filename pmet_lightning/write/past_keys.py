"""Files of K_past K_pastᵀ, the products of the keys of earlier edit batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pmet_lightning.model.architectures import ProjectionId
from pmet_lightning.utils.errors import PmetError
from pmet_lightning.utils.tensor_files import save_tensors


def save_products(path: Path, products: Mapping[ProjectionId, Tensor]) -> None:
    """Store symmetric matrices, each packed by :func:`~pmet_lightning.solver.packed.pack_lower`; replaces the file."""
    save_tensors(path, {f"{site}-{layer}": packed for (site, layer), packed in products.items()})


def load_products(path: Path) -> dict[ProjectionId, Tensor]:
    """What :func:`save_products` has stored, still packed and on the CPU.

    Each matrix is moved to the model's device only while it is used; all of them might not fit there.

    Raises:
        PmetError: If the file cannot be read.
    """
    found: dict[ProjectionId, Tensor] = {}
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise PmetError(
            f"{path}: unreadable keys of earlier edit batches ({error}); put the file back, or begin a new run in "
            "another --trainer.run_dir"
        ) from error
    for name, packed in stored.items():
        site, layer = name.split("-")
        found[site, int(layer)] = packed  # type: ignore[index]
    return found

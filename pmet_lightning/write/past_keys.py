"""Files of K_past K_pastᵀ, the products of the keys of earlier edit batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from pmet_lightning.model.architectures import ProjectionId
from pmet_lightning.utils.files import atomic_path


def save_products(path: Path, products: Mapping[ProjectionId, Tensor]) -> None:
    """Store symmetric matrices, each packed by :func:`~pmet_lightning.solver.packed.pack_lower`; replaces the file."""
    with atomic_path(path) as temporary:
        save_file({f"{site}-{layer}": packed for (site, layer), packed in products.items()}, temporary)


def load_products(path: Path) -> dict[ProjectionId, Tensor]:
    """What :func:`save_products` has stored, still packed and on the CPU.

    Each matrix is moved to the model's device only while it is used; all of them might not fit there.
    """
    found: dict[ProjectionId, Tensor] = {}
    for name, packed in load_file(path).items():
        site, layer = name.split("-")
        found[site, int(layer)] = packed  # type: ignore[index]
    return found

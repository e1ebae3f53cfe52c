"""Files of the keys of earlier edit batches, K_past K_pastᵀ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from pmet_lightning.model.architectures import ProjectionId
from pmet_lightning.utils.files import atomic_path


def save_products(path: Path, products: Mapping[ProjectionId, Tensor]) -> None:
    """Store symmetric matrices, each as :func:`pack_lower` has it, in place of what is there."""
    with atomic_path(path) as temporary:
        save_file({f"{site}-{layer}": packed for (site, layer), packed in products.items()}, temporary)


def load_products(path: Path) -> dict[ProjectionId, Tensor]:
    """What :func:`save_products` has stored, packed as it is and on the CPU.

    A matrix goes to the model's device when it is worked with; they are too many for it.
    """
    found: dict[ProjectionId, Tensor] = {}
    for name, packed in load_file(path).items():
        site, layer = name.split("-")
        found[site, int(layer)] = packed  # type: ignore[index]
    return found

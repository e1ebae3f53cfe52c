"""The patch: ΔW of every edited weight, with a manifest of what it belongs to. Nothing else is stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pmet_lightning.model.projections import Sites, add_to_weight, is_transposed
from pmet_lightning.utils.errors import PmetError
from pmet_lightning.utils.files import write_json
from pmet_lightning.utils.tensor_files import save_tensors

FORMAT = 1


class PatchError(PmetError):
    """A patch that cannot be read or does not belong to the model."""


def save_patch(path: str | Path, deltas: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write ``patch.safetensors`` and, beside it, the manifest as ``patch.json``.

    Args:
        path: The .safetensors file.
        deltas: ΔW by weight name, shape [out, in] whatever the weight's own layout.
        manifest: Base model, its fingerprint, settings, versions.
    """
    path = Path(path).expanduser()
    described = {"format": FORMAT, **manifest, "weights": {n: list(d.shape) for n, d in deltas.items()}}
    stored = {name: delta.detach().cpu().contiguous() for name, delta in deltas.items()}
    save_tensors(path, stored, {"manifest": json.dumps(described)})
    write_json(path.with_suffix(".json"), described)


def load_patch(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a patch and its manifest.

    Raises:
        FileNotFoundError: If there is no such file.
        PatchError: If the file is not a patch.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no patch {str(path)!r}; expected the patch.safetensors of a run folder")
    try:
        with safe_open(path, framework="pt") as file:
            manifest = json.loads((file.metadata() or {})["manifest"])
            return {name: file.get_tensor(name) for name in file.keys()}, manifest  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise PatchError(f"{path}: not a patch of this program ({error})") from error


def rounding_of(model: nn.Module, deltas: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    """Share of ‖ΔW‖ that is lost where W + ΔW is stored in a precision: ‖stored change − ΔW‖ / ‖ΔW‖ of all weights.

    Args:
        model: The base model.
        deltas: ΔW by weight name, shape [out, in].
        dtype: The precision.
    """
    lost = norm = 0.0
    for name, delta_OI in deltas.items():
        projection = model.get_submodule(name.removesuffix(".weight"))
        weight: Tensor = projection.weight.detach().to(delta_OI.dtype)  # type: ignore[operator,union-attr,assignment]
        delta = (delta_OI.T if is_transposed(projection) else delta_OI).to(weight.device)
        stored = (weight + delta).to(dtype).to(delta.dtype) - weight
        lost += float((stored - delta).double().square().sum())
        norm += float(delta.double().square().sum())
    return (lost / norm) ** 0.5 if norm else 0.0


def apply_patch(model: nn.Module, sites: Sites, path: str | Path, model_fingerprint: str) -> dict[str, Any]:
    """Add a patch's ΔW to a model's weights.

    Args:
        model: The base model.
        sites: Its modules.
        path: The .safetensors file.
        model_fingerprint: Fingerprint of ``model``.

    Returns:
        The manifest.

    Raises:
        PatchError: If the patch was made for other weights; the model is unchanged then.
    """
    deltas, manifest = load_patch(path)
    if manifest["fingerprint"] != model_fingerprint:
        raise PatchError(
            f"{path} was made for the model {manifest['model']!r} with fingerprint {manifest['fingerprint']}, "
            f"found {model_fingerprint}; load the base model it names, in the precision it names "
            f"({manifest['dtype']})"
        )
    projections = {name: model.get_submodule(name.removesuffix(".weight")) for name in deltas}
    for name, delta in deltas.items():
        shape = list(projections[name].weight.shape)  # type: ignore[union-attr,arg-type]
        expected = shape[::-1] if is_transposed(projections[name]) else shape
        if list(delta.shape) != expected:
            raise PatchError(f"{path}: {name} has shape {list(delta.shape)}, expected {expected}")
    with torch.no_grad():
        for name, delta in deltas.items():
            add_to_weight(projections[name], delta)
    return manifest

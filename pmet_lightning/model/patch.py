"""The patch: ΔW of every edited weight, with a manifest of what it belongs to (docs/patches.md: the file format)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pmet_lightning.model.projections import Sites, add_to_weight, is_transposed
from pmet_lightning.model.quantized_base import hold_unquantized
from pmet_lightning.solver.weight_delta import WeightDelta
from pmet_lightning.utils.errors import PmetError
from pmet_lightning.utils.files import write_json
from pmet_lightning.utils.tensor_files import digest_of, save_tensors

FORMAT = 2  # 1: every ΔW a matrix, and no digest
_FACTORS = (".left", ".right")  # endings of the names of two factors; a matrix has the name of its weight
_TARGETS = "targets."  # begins the names of targets


class PatchError(PmetError):
    """A patch that cannot be read or does not belong to the model."""


@dataclass(frozen=True)
class Patch:
    """What a patch file holds.

    Attributes:
        deltas: ΔW by weight name, shape [out, in] whatever the weight's own layout.
        manifest: Base model, its fingerprint, settings, versions, and ``facts``, one entry for each fact.
        targets: v* of the facts by site and layer (``ffn-7``), shape [facts, F]; none in an earlier version's patch.
    """

    deltas: dict[str, WeightDelta]
    manifest: dict[str, Any]
    targets: dict[str, Tensor]


def save_patch(
    path: str | Path,
    deltas: Mapping[str, WeightDelta],
    manifest: Mapping[str, Any],
    targets: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``patch.safetensors`` and, beside it, the manifest as ``patch.json``.

    Args:
        path: The .safetensors file.
        deltas: As in :class:`Patch`.
        manifest: As in :class:`Patch`.
        targets: As in :class:`Patch`.
    """
    path = Path(path).expanduser()
    named = _named_tensors(deltas) | {_TARGETS + site: values_NF for site, values_NF in (targets or {}).items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    weights = {name: {"shape": list(delta.shape), "rank": delta.rank} for name, delta in deltas.items()}
    described: dict[str, Any] = {**manifest, "format": FORMAT, "weights": weights}
    described["digest"] = digest_of(sorted(tensors.items()), described)
    save_tensors(path, tensors, {"manifest": json.dumps(described)})
    save_manifest(path, described)


def save_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a patch beside it, to be read without this program."""
    write_json(path.with_suffix(".json"), manifest)


def load_patch(path: str | Path) -> tuple[dict[str, WeightDelta], dict[str, Any]]:
    """ΔW by weight name and the manifest of a patch; raises what :func:`read_patch` does."""
    patch = read_patch(path)
    return patch.deltas, patch.manifest


def read_patch(path: str | Path) -> Patch:
    """Read a patch and check that it is as it was written.

    Raises:
        FileNotFoundError: If there is no such file.
        PatchError: If the file is not a patch, of a later format, or not as it was written.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no patch {str(path)!r}; expected the patch.safetensors of a run folder")
    try:
        with safe_open(path, framework="pt") as file:
            manifest = json.loads((file.metadata() or {})["manifest"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        deltas = _checked_deltas(path, tensors, manifest)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise PatchError(f"{path}: not a patch of this program, or broken ({error})") from error
    targets = {name.removeprefix(_TARGETS): t for name, t in tensors.items() if name.startswith(_TARGETS)}
    return Patch(deltas, manifest, targets)


def _named_tensors(deltas: Mapping[str, WeightDelta]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        endings = ("",) if delta.rank is None else _FACTORS
        named |= {name + ending: tensor for ending, tensor in zip(endings, delta.tensors, strict=True)}
    return named


def _checked_deltas(path: Path, tensors: dict[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, WeightDelta]:
    """ΔW by weight name, if the file is whole and as it was written."""
    version = manifest["format"]
    if version == 1:
        return {name: WeightDelta(tensor) for name, tensor in tensors.items()}
    if version != FORMAT:
        raise PatchError(
            f"{path}: a patch of format {version}, found by a program that reads formats 1 to {FORMAT}; update "
            "pmet-lightning"
        )
    if manifest.get("digest") != digest_of(sorted(tensors.items()), manifest):
        raise PatchError(f"{path}: is not as it was written (its digest differs); take it from where it was copied")
    return {name: _delta_of(name, about["rank"], tensors) for name, about in manifest["weights"].items()}


def _delta_of(name: str, rank: int | None, tensors: Mapping[str, Tensor]) -> WeightDelta:
    return WeightDelta.of([tensors[name + ending] for ending in (("",) if rank is None else _FACTORS)])


def precision_of(manifest: Mapping[str, Any]) -> str:
    """The precision of the model that a patch belongs to, and how it is quantised, if it is."""
    quantization = manifest.get("quantization")
    return str(manifest["dtype"]) if quantization is None else f"{manifest['dtype']}, quantised ({quantization})"


def rounding_of(model: nn.Module, deltas: Mapping[str, WeightDelta], dtype: torch.dtype) -> float:
    """Share of ‖ΔW‖ that is lost where W + ΔW is stored in a precision: ‖stored change − ΔW‖ / ‖ΔW‖ of all weights.

    Args:
        model: The base model.
        deltas: ΔW by weight name.
        dtype: The precision.
    """
    lost = norm = 0.0
    for name, weight_delta in deltas.items():
        projection, delta_OI = model.get_submodule(name.removesuffix(".weight")), weight_delta.dense()
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
    patch = read_patch(path)
    apply_read_patch(model, sites, patch, path, model_fingerprint)
    return patch.manifest


def apply_read_patch(model: nn.Module, sites: Sites, patch: Patch, path: str | Path, model_fingerprint: str) -> None:
    """As :func:`apply_patch`, with what was read of the file already; ``path`` is for messages."""
    manifest = patch.manifest
    if manifest["fingerprint"] != model_fingerprint:
        raise PatchError(
            f"{path} was made for the model {manifest['model']!r} with fingerprint {manifest['fingerprint']}, "
            f"found {model_fingerprint}; load the base model it names, in the precision it names "
            f"({precision_of(manifest)})"
        )
    hold_unquantized(model, [name.removesuffix(".weight") for name in patch.deltas])
    projections = {name: model.get_submodule(name.removesuffix(".weight")) for name in patch.deltas}
    for name, delta in patch.deltas.items():
        shape = list(projections[name].weight.shape)  # type: ignore[union-attr,arg-type]
        expected = shape[::-1] if is_transposed(projections[name]) else shape
        if list(delta.shape) != expected:
            raise PatchError(f"{path}: {name} has shape {list(delta.shape)}, expected {expected}")
    add_deltas(model, patch.deltas)


@torch.no_grad()
def add_deltas(model: nn.Module, deltas: Mapping[str, WeightDelta]) -> None:
    """Add ΔW to a model's weights, by their names."""
    for name, delta in deltas.items():
        add_to_weight(model.get_submodule(name.removesuffix(".weight")), delta.dense())

"""The manifest of a patch: what it belongs to, and how it was made."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pmet_lightning.model.patch import PatchError
from pmet_lightning.model.projections import is_transposed
from pmet_lightning.moments.second_moments import SecondMoments
from pmet_lightning.moments.store import MomentKey
from pmet_lightning.run.hparams import settings_of
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.versions import versions
from pmet_lightning.write.weight_spread import WeightSpread

log = logging.getLogger(__name__)

# What must be the same when a run is resumed, besides the settings.
_IDENTITY = ("fingerprint", "layers", "optimizer", "contexts", "moments")
# Settings that do not affect ΔW, or that the identity describes more exactly.
_NOT_COMPARED = {
    *(f"model.{name}" for name in ("model_name", "layers", "dtype", "optimizer", "contexts", "context_count")),
    *(f"model.{name}" for name in ("context_length", "seed", "free_tokens", "texts", "patch", "trust_remote_code")),
    "model.quantize",
}


def moments_of(module: TargetOptimizer, moments: SecondMoments) -> dict[str, Any]:
    """What the second moments of a run depend on."""
    return vars(moments.key(module)) | {"given": moments.given}


def manifest_of(
    module: TargetOptimizer, spread: WeightSpread, moments: Mapping[str, Any] | None, edit_batches: int, edits: int
) -> dict[str, Any]:
    """The description of a patch that is stored in it.

    Args:
        module: The module with the model.
        spread: The callback that has written it.
        moments: As :func:`moments_of` gives them.
        edit_batches: Number of edit batches in the patch.
        edits: Number of edits in the patch.
    """
    settings = settings_of("model", module) | settings_of("spread", spread)
    return {
        "model": module.model_name,
        "fingerprint": module.base_fingerprint,
        "dtype": str(next(module.model.parameters()).dtype).removeprefix("torch."),
        "quantize": module.quantize,
        "quantization": module.quantization,
        "layers": module.layers,
        "transposed": is_transposed(module.sites.module("ffn", module.target_layer)),
        "optimizer": module.optimizer_settings,
        "contexts": module.contexts,
        "moments": moments,
        "settings": {name: value for name, value in settings.items() if name not in _NOT_COMPARED},
        "edit_batches": edit_batches,
        "edits": edits,
        "versions": versions(),
    }


def sections_of(manifest: Mapping[str, Any], moments_folder: str | Path) -> dict[str, dict[str, Any]]:
    """The settings with which the edits of a patch are written again, or further ones added to them.

    Args:
        manifest: The manifest of the patch.
        moments_folder: The cache of second moments.

    Returns:
        The sections ``model``, ``moments`` and ``spread`` of a configuration.

    Raises:
        PatchError: If the patch does not hold its facts and targets.
    """
    if "facts" not in manifest:
        raise PatchError(
            "the patch is of an earlier version and holds no targets; expected one of this version: write the edits "
            "again with fit"
        )
    sections: dict[str, dict[str, Any]] = {"model": {}, "spread": {}}
    for name, value in manifest["settings"].items():
        section, _, setting = name.partition(".")
        sections[section][setting] = value
    kind, values = manifest["optimizer"]
    accepted = inspect.signature(getattr(torch.optim, kind)).parameters
    optimizer = {"class_path": f"torch.optim.{kind}", "init_args": {k: v for k, v in values.items() if k in accepted}}
    sections["model"] |= {"layers": manifest["layers"], "contexts": manifest["contexts"], "optimizer": optimizer}
    moments = dict(manifest["moments"])
    given = moments.pop("given")
    sections["moments"] = {"given": given or str(Path(moments_folder).expanduser() / MomentKey(**moments).folder())}
    return sections


def check_same_kind(ours: Mapping[str, Any], other: Mapping[str, Any], path: Path) -> None:
    """Refuse to join patches that were not made in the same way.

    Args:
        ours: The manifest of the one.
        other: The manifest of the other.
        path: Its file, for the message.

    Raises:
        PatchError: If something differs; the message says what.
    """
    if "facts" not in other:
        raise PatchError(f"{path} is of an earlier version and holds no targets; write its edits again with fit")
    mine, theirs = ({k: v for k, v in _compared(_as_json(m)).items() if k != "contexts"} for m in (ours, other))
    differences = [
        f"{name}: {theirs.get(name)}, expected {value}" for name, value in mine.items() if theirs.get(name) != value
    ]
    if differences:
        raise PatchError(
            f"{path} was made in another way ({'; '.join(differences)}); patches that are joined must agree"
        )
    if ours["contexts"] != other["contexts"]:
        log.warning("%s: its contexts are others; keys are measured in those of the first patch", path)


def check_same_settings(earlier: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume a run whose edits were written with other settings.

    Args:
        earlier: The manifest of its patch.
        now: The manifest of this run.
        folder: The run folder, for the message.

    Raises:
        ValueError: If something differs; the message says what.
    """
    then, current = _compared(earlier), _compared(_as_json(now))
    differences = [
        f"{name}: {then.get(name)} then, {value} now" for name, value in current.items() if then.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"--trainer.resume: {folder} holds a run with other settings ({'; '.join(differences)}); give the same "
            "ones, or another --trainer.run_dir"
        )


def _as_json(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as it is when it is read again."""
    return dict(json.loads(json.dumps(manifest, default=str)))


def _compared(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: manifest.get(name) for name in _IDENTITY} | manifest.get("settings", {})

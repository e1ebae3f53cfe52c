"""The manifest of a patch: what it belongs to, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmet_lightning.moments.second_moments import SecondMoments
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.versions import versions
from pmet_lightning.write.weight_spread import WeightSpread

# What decides which ΔW an edit gets: all of it must be the same when a run goes on.
_SETTINGS = (
    "fingerprint",
    "chat",
    "keep_float32",
    "layers",
    "sites",
    "optimised",
    "lam",
    "rule",
    "null_space",
    "protect_past",
    "rules",
    "optimizer",
    "contexts",
    "moments",
)


def moments_of(module: TargetOptimizer, moments: SecondMoments) -> dict[str, Any]:
    """What the second moments of a run came from."""
    return vars(moments.key(module)) | {"given": moments.given}


def manifest_of(
    module: TargetOptimizer, spread: WeightSpread, moments: Mapping[str, Any] | None, edits: int
) -> dict[str, Any]:
    """What a patch says about itself.

    Args:
        module: The module with the model.
        spread: What has written it.
        moments: As :func:`moments_of` gives them.
        edits: Edits that this run has written.
    """
    return {
        "model": module.model_name,
        "fingerprint": module.base_fingerprint,
        "dtype": str(next(module.model.parameters()).dtype).removeprefix("torch."),
        "chat": module.chat,
        "keep_float32": module.keep_float32,
        "layers": module.layers,
        "sites": spread.sites,
        "optimised": module.sites_optimised,
        "lam": spread.lam,
        "rule": spread.rule,
        "null_space": spread.null_space,
        "protect_past": spread.protect_past,
        "rules": vars(module.rules),
        "optimizer": module.optimizer_settings,
        "contexts": module.contexts,
        "moments": moments,
        "edit_batches": spread.report.edit_batch + 1 if spread.report else 0,
        "edits": module.edits_done + edits,
        "versions": versions(),
    }


def check_same_settings(earlier: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a run whose edits were written with other settings.

    Args:
        earlier: The manifest of its patch.
        now: That of this run.
        folder: The run folder, for the message.

    Raises:
        ValueError: If something differs; it says what.
    """
    mine = json.loads(json.dumps(now, default=str))
    differences = [
        f"{name}: {was} then, {mine[name]} now" for name in _SETTINGS if mine[name] != (was := earlier.get(name))
    ]
    if differences:
        raise ValueError(
            f"--trainer.resume: {folder} holds a run with other settings ({'; '.join(differences)}); give the same "
            "ones, or another --trainer.run_dir"
        )

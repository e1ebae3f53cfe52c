"""The manifest of a patch: what it belongs to, and how it was made."""

from __future__ import annotations

from typing import Any

from pmet_lightning.module import TargetOptimizer
from pmet_lightning.report_data import versions
from pmet_lightning.spread import WeightSpread


def manifest_of(module: TargetOptimizer, spread: WeightSpread, edits: int) -> dict[str, Any]:
    """What a patch says about itself.

    Args:
        module: The module with the model.
        spread: What has written it.
        edits: Edits that this run has written.
    """
    return {
        "model": module.model_name,
        "fingerprint": module.base_fingerprint,
        "dtype": str(next(module.model.parameters()).dtype).removeprefix("torch."),
        "layers": module.layers,
        "sites": spread.sites,
        "optimised": module.sites_optimised,
        "lam": spread.lam,
        "rule": spread.rule,
        "null_space": spread.null_space,
        "protect_past": spread.protect_past,
        "rules": vars(module.rules),
        "contexts": module.contexts,
        "edit_batches": spread.report.edit_batch + 1 if spread.report else 0,
        "edits": module.edits_done + edits,
        "versions": versions(),
    }

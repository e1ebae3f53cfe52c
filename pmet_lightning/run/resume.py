"""Resuming a run: read from its folder what was done, and do it again to the model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from pmet_lightning.model.patch import apply_patch, read_patch
from pmet_lightning.run.journal import Journal
from pmet_lightning.run.manifest import check_same_settings, manifest_of
from pmet_lightning.run.patch_file import check_past_keys, finish_replacing, known_past_keys
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.callbacks import find_callback
from pmet_lightning.utils.distributed import ProcessGroup
from pmet_lightning.write.facts import facts_of
from pmet_lightning.write.weight_spread import WeightSpread


def restore_progress(
    trainer: L.Trainer,
    module: L.LightningModule,
    patch: Path,
    journal: Journal,
    moments: Mapping[str, Any] | None,
) -> tuple[int, int]:
    """Have module, spread callback and data continue after the patch; drop what the journal holds beyond it.

    Args:
        trainer: The trainer.
        module: Its module.
        patch: The patch of the run folder.
        journal: The journal of the run folder.
        moments: What the second moments depend on.

    Returns:
        Numbers of edit batches and of edits that the patch holds.

    Raises:
        FileNotFoundError: If something that the run has written is missing.
        ValueError: If it was another run.
    """
    batches = 0
    if patch.is_file():
        assert isinstance(module, TargetOptimizer)
        batches = _resume_after(trainer, module, patch, journal, moments)
    return batches, ProcessGroup.of(trainer).compute_object_on_rank_zero(lambda: journal.keep(batches))


def reapply_patch(trainer: L.Trainer, module: TargetOptimizer, patch: Path) -> None:
    """Write the patch of the resumed run into the model again."""
    spread = find_callback(trainer, WeightSpread)
    assert spread is not None
    spread.edited.record_base_norms(module)
    apply_patch(module.model, module.sites, patch, module.base_fingerprint)


def _resume_after(
    trainer: L.Trainer,
    module: TargetOptimizer,
    patch: Path,
    journal: Journal,
    moments: Mapping[str, Any] | None,
) -> int:
    spread = find_callback(trainer, WeightSpread)
    assert spread is not None
    kept = read_patch(patch)
    manifest = kept.manifest
    batches = int(manifest["edit_batches"])
    module.contexts = module.given_contexts or manifest["contexts"]
    check_same_settings(manifest, manifest_of(module, spread, moments, 0, 0), patch.parent)
    if spread.protect_past:
        check_past_keys(patch, kept)
    trainer.datamodule.resume_after(itertools.islice(journal.edits(), manifest["edits"]))  # type: ignore[attr-defined]
    past_keys = {}
    if trainer.is_global_zero:  # the process that solves: the keys are as large as the second moments
        past_keys = known_past_keys(patch, kept, spread.protect_past)
        finish_replacing(patch, kept)
    spread.edited.resume(kept.deltas, past_keys, facts_of(manifest.get("facts", []), kept.targets, str(patch)))
    module.batches_done = batches - 1  # the first batch of this epoch stands for what was written
    return batches

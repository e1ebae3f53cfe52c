"""What an editor has written into its model: how much, whether it is still there, and how it is taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from pmet_lightning.editor.history import History
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.model.fingerprint import checksum
from pmet_lightning.model.patch import Patch, apply_read_patch
from pmet_lightning.run.patch_file import known_past_keys
from pmet_lightning.write.edited_weights import Snapshot
from pmet_lightning.write.facts import facts_of
from pmet_lightning.write.weight_spread import WeightSpread


class EditedModel:
    """The edits in a model, call by call, and checksums that show if something else changes its weights.

    Args:
        module: The module with the model.
        spread: What writes.
    """

    def __init__(self, module: EditableModel, spread: WeightSpread) -> None:
        self._module, self._spread, self._edited = module, spread, spread.edited
        self._history = History(self._edited, module)
        self._checksums = self._weight_checksums()

    def record(self, before: Snapshot, batches: int, edits: int) -> None:
        """Record a call that has written something.

        Args:
            before: The state before it.
            batches: Number of edit batches that are written now.
            edits: Number of edits that are written now.
        """
        self._history.add(before, self._module.batches_done, self._module.edits_done)
        self._now_at(batches, edits)

    @contextmanager
    def rewriting(self, batches: int, edits: int) -> Iterator[None]:
        """Write into the clean weights what is written inside, in place of what is there; as one call.

        If it fails, everything is as it was.

        Args:
            batches: Number of edit batches that are written inside.
            edits: Number of edits that are.
        """
        before = self._edited.snapshot(self._module)
        counts = self._module.batches_done, self._module.edits_done
        try:
            self._history.restore_clean()
            self._now_at(0, 0)
            yield
        except BaseException:
            self._edited.restore(before)
            self._now_at(*counts)
            raise
        self._history.add(before, *counts)
        self._now_at(batches, edits)

    def undo(self, steps: int) -> None:
        """Take back the last calls.

        Args:
            steps: Number of calls.

        Raises:
            RuntimeError: If there are fewer calls, or something else has changed the edited weights.
        """
        if not 0 < steps <= len(self._history):
            raise RuntimeError(
                f"undo: {steps} steps, but {len(self._history)} calls of edit and remove can be taken back"
                if self._history
                else "nothing to undo: no call of edit or remove is left"
            )
        self.check_unchanged()
        step = self._history.back(steps)
        self._now_at(step.batches, step.edits)

    def revert(self) -> None:
        """Take back everything, bit by bit.

        Raises:
            RuntimeError: If something else has changed the edited weights.
        """
        self.check_unchanged()
        self._history.restore_clean()
        self._history.clear()
        self._now_at(0, 0)

    def take_over(self, path: Path, patch: Patch) -> None:
        """Write a patch into the clean model, as if it had been edited here.

        Args:
            path: The patch.
            patch: What it holds.

        The model is unchanged if anything is wrong.

        Raises:
            FileNotFoundError: If its protected keys are missing.
            PatchError: If it was made for other weights.
        """
        manifest, module = patch.manifest, self._module
        past_keys = known_past_keys(path, patch, self._spread.protect_past)
        clean = self._edited.snapshot(module)
        self._edited.record_base_norms(module)
        apply_read_patch(module.model, module.sites, patch, path, module.base_fingerprint)
        self._edited.resume(patch.deltas, past_keys, facts_of(manifest["facts"], patch.targets, str(path)))
        self.record(clean, int(manifest["edit_batches"]), int(manifest["edits"]))

    def check_unchanged(self) -> None:
        """Check that the edited weights are those that were left.

        Raises:
            RuntimeError: If something else has changed them.
        """
        found = self._weight_checksums()
        changed = [name for name, value in self._checksums.items() if found[name] != value]
        if changed:
            raise RuntimeError(
                f"{', '.join(changed)} {'is' if len(changed) == 1 else 'are'} not what this editor left: something "
                "else has changed the model, so the editor's second moments and patch no longer match it; make a new "
                "Editor for the model as it is now"
            )

    def _now_at(self, batches: int, edits: int) -> None:
        """Record how much is in the weights, and the weights."""
        self._module.batches_done, self._module.edits_done = batches, edits
        self._checksums = self._weight_checksums()

    def _weight_checksums(self) -> dict[str, str]:
        """Checksums of the edited weights."""
        sites, checksums = self._module.sites, {}
        for projection_id in sites.written(self._spread.sites, self._module.layers):
            weight = sites.module(*projection_id).weight
            assert isinstance(weight, Tensor)
            checksums[sites.weight_name(*projection_id)] = f"{weight.dtype} {checksum(weight.detach())}"
        return checksums

"""The patch of a run folder, and the file of the protected keys that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pmet_lightning.model.architectures import ProjectionId
from pmet_lightning.model.patch import Patch, read_patch, save_patch
from pmet_lightning.write.edited_weights import EditedWeights
from pmet_lightning.write.facts import stacked_values
from pmet_lightning.write.past_keys import load_past_keys, save_past_keys

PATCH = "patch.safetensors"


def patch_path(given: str | Path) -> Path:
    """The patch of a run folder, or the patch itself."""
    path = Path(given).expanduser()
    return path / PATCH if path.is_dir() else path


def save_edits(path: str | Path, edited: EditedWeights, manifest: Mapping[str, Any]) -> None:
    """Write what was edited as a patch, with its facts and their targets.

    Args:
        path: The .safetensors file.
        edited: What was written.
        manifest: The description of the patch, without its facts.
    """
    facts = [fact.plain() for fact in edited.facts]
    save_patch(path, edited.deltas, {**manifest, "facts": facts}, stacked_values(edited.facts))


class PatchFile:
    """``patch.safetensors``, replaced as one file after each edit batch; ``past-N.safetensors`` for protected keys.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / PATCH

    def save(self, edited: EditedWeights, manifest: Mapping[str, Any], protect_past: bool) -> None:
        """Replace the patch; new protected keys are saved before it, and those of the old patch deleted after it.

        Whenever the process is killed, the keys that the patch's manifest asks for are there.

        Args:
            edited: What was written.
            manifest: The description of the patch, with the number of its edit batches.
            protect_past: Whether the keys of earlier edit batches are protected.
        """
        past = self._past_path(manifest["edit_batches"])
        if protect_past:
            self.save_past_keys(edited, manifest["edit_batches"])
        save_edits(self.path, edited, manifest)
        for path in self.path.parent.glob("past-*.safetensors"):
            if path != past:
                path.unlink()

    def load(self) -> Patch:
        """What it holds."""
        return read_patch(self.path)

    def save_past_keys(self, edited: EditedWeights, edit_batches: int) -> None:
        """Store the protected keys of so many edit batches."""
        save_past_keys(self._past_path(edit_batches), edited.past_keys)

    def past_keys(self, edit_batches: int) -> dict[ProjectionId, Tensor]:
        """The protected keys of so many edit batches."""
        return load_past_keys(self._past_path(edit_batches))

    def check_past_keys(self, edit_batches: int) -> None:
        """Check that the protected keys of so many edit batches are there.

        Raises:
            FileNotFoundError: If they are not.
        """
        path = self._past_path(edit_batches)
        if not path.is_file():
            raise FileNotFoundError(
                f"no {str(path)!r}, the protected keys of the {edit_batches} edit batches in {self.path.name}; "
                "expected them beside it: put the file back, or begin a new run in another --trainer.run_dir"
            )

    def _past_path(self, edit_batches: int) -> Path:
        return self.path.with_name(f"past-{edit_batches}.safetensors")

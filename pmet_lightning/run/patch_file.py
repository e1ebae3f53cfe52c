"""The patch of a run folder, and the file of the protected keys that belongs to it."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pmet_lightning.model.architectures import ProjectionId
from pmet_lightning.model.patch import Patch, PatchError, save_manifest, save_patch
from pmet_lightning.write.edited_weights import EditedWeights
from pmet_lightning.write.facts import stacked_values
from pmet_lightning.write.past_keys import load_past_keys, past_keys_digest, save_past_keys

PATCH = "patch.safetensors"
_PAST = "past_keys"  # the manifest's entry: the digest of the protected keys


def patch_path(given: str | Path) -> Path:
    """The patch of a run folder, or the patch itself."""
    path = Path(given).expanduser()
    return path / PATCH if path.is_dir() else path


def past_keys_of(path: Path, patch: Patch) -> dict[ProjectionId, Tensor]:
    """The protected keys that belong to a patch, from the file beside it.

    Args:
        path: The patch.
        patch: What it holds.

    Raises:
        FileNotFoundError: If the file is missing.
        PmetError: If it is not as it was written.
    """
    check_past_keys(path, patch)
    digest: str = patch.manifest[_PAST]
    return load_past_keys(_past_path(path, digest), digest)


def known_past_keys(path: Path, patch: Patch, protect_past: bool | None) -> dict[ProjectionId, Tensor]:
    """The protected keys beside a patch; empty where they may be measured again, and there is no file.

    Args:
        path: The patch.
        patch: What it holds.
        protect_past: As for :class:`~pmet_lightning.WeightSpread`.

    Raises:
        FileNotFoundError: If the file is missing, and it has to be there.
        PmetError: If it is not as it was written.
    """
    digest = patch.manifest.get(_PAST)
    if protect_past is False or (protect_past is None and (digest is None or not _past_path(path, digest).is_file())):
        return {}
    return past_keys_of(path, patch)


def check_past_keys(path: Path, patch: Patch) -> None:
    """Check that the protected keys that belong to a patch are there.

    Raises:
        PatchError: If an earlier version wrote it.
        FileNotFoundError: If they are not.
    """
    digest = patch.manifest.get(_PAST)
    if digest is None:
        raise PatchError(
            f"{path}: names no protected keys, as an earlier version wrote it; go on with that version, or begin a new "
            "run in another --trainer.run_dir"
        )
    past = _past_path(path, digest)
    if not past.is_file():
        raise FileNotFoundError(
            f"no {str(past)!r}, the protected keys of the {patch.manifest['edit_batches']} edit batches in "
            f"{path.name}; expected them beside it: put the file back, or begin a new run in another --trainer.run_dir"
        )


def save_edits(path: str | Path, edited: EditedWeights, manifest: Mapping[str, Any], with_keys: bool) -> None:
    """Write what was edited as a patch, with its facts and their targets, and the protected keys beside it.

    The keys are written before the patch, under a name of their own, and those of the patch that it replaces are
    deleted after it: whenever the process is killed, the keys that a patch names are there.

    Args:
        path: The .safetensors file.
        edited: What was written.
        manifest: The description of the patch, without its facts.
        with_keys: Whether the keys that are protected are stored.
    """
    path = Path(path).expanduser()
    digest = past_keys_digest(edited.past_keys) if with_keys else None
    if digest is not None:
        save_past_keys(_past_path(path, digest), edited.past_keys)
    facts = [fact.plain() for fact in edited.facts]
    save_patch(path, edited.deltas, {**manifest, _PAST: digest, "facts": facts}, stacked_values(edited.facts))
    _remove_other_keys(path, digest)


def finish_replacing(path: Path, patch: Patch) -> None:
    """Bring the files beside a patch up to it, in case the process that replaced it was killed right afterwards.

    Args:
        path: The patch.
        patch: What it holds.
    """
    save_manifest(path, patch.manifest)
    _remove_other_keys(path, patch.manifest.get(_PAST))


def _remove_other_keys(path: Path, digest: str | None) -> None:
    """Delete the files of protected keys beside a patch but for one."""
    for other in path.parent.glob(f"{glob.escape(path.stem)}-past-*.safetensors"):
        if digest is None or other != _past_path(path, digest):
            other.unlink()


def _past_path(path: Path, digest: str) -> Path:
    """The file of the protected keys of a patch; of two in one folder, or an old and a new one, each has its own."""
    return path.with_name(f"{path.stem}-past-{digest[:12]}.safetensors")

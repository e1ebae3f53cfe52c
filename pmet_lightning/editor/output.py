"""What an :class:`~pmet_lightning.editor.editor.Editor` writes for others: a model folder, an adapter, an upload."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pmet_lightning.model.adapter import save_adapter
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.model.generation_config import save_model
from pmet_lightning.model.origin import write_origin
from pmet_lightning.report.model_card import write_card
from pmet_lightning.solver.weight_delta import WeightDelta
from pmet_lightning.utils.files import new_folder
from pmet_lightning.utils.processor_files import copy_processor_files


def write_model_folder(
    folder: str | Path,
    model: nn.Module,
    processor: Any,
    deltas: Mapping[str, WeightDelta],
    described: Mapping[str, Any],
    *,
    in_float32: bool,
) -> None:
    """Write a model and its tokenizer as a Hugging Face folder, with a card if it was edited.

    Args:
        folder: The folder; must be new or empty.
        model: The model.
        processor: Its tokenizer, or the processor that holds it.
        deltas: ΔW by weight name; empty if it was not edited.
        described: The manifest with the facts.
        in_float32: Whether all weights are written in float32.

    Raises:
        FileExistsError: If the folder is not empty.
    """
    with new_folder(folder, "Editor.save:") as unfinished:
        save_model(model, unfinished, in_float32=in_float32)
        processor.save_pretrained(unfinished)
        copy_processor_files(str(getattr(model, "name_or_path", "")), unfinished)
        if deltas:
            write_origin(unfinished, described, fingerprint(model))
            write_card(unfinished, described, weights=deltas)


def write_adapter_folder(folder: str | Path, deltas: Mapping[str, WeightDelta], described: Mapping[str, Any]) -> int:
    """Write ΔW as a LoRA adapter with a card.

    Args:
        folder: The folder; must be new or empty.
        deltas: ΔW by weight name.
        described: The manifest with the facts.

    Returns:
        The rank of the adapter.

    Raises:
        FileExistsError: If the folder is not empty.
        PmetError: If ``peft`` is not installed.
    """
    with new_folder(folder, "Editor.save_adapter:") as unfinished:
        rank = save_adapter(unfinished, deltas, described)
        write_card(unfinished, described, weights=deltas, adapter_rank=rank)
    return rank


def upload_folder(save: Callable[[Path], None], repo_id: str, private: bool | None, token: str | None) -> str:
    """Upload a folder to the Hugging Face hub.

    Args:
        save: Writes the folder.
        repo_id: The repository, which is made if it does not exist.
        private: Whether a new repository is private; by default as the account says.
        token: An access token; by default the one that was logged in with.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Edited model"))

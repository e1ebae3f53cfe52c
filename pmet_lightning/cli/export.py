"""The command ``export``: writes base model plus patch as a Hugging Face folder that any program can open."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.model.architectures import Architecture, architecture_of
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.model.generation_config import save_model
from pmet_lightning.model.loading import DtypeName, load_model
from pmet_lightning.model.patch import apply_patch, load_patch
from pmet_lightning.model.projections import Sites
from pmet_lightning.utils.files import new_folder
from pmet_lightning.utils.processor_files import copy_processor_files

log = logging.getLogger(__name__)


def export(
    run: str,
    out: str,
    base: str | None = None,
    architecture: Architecture | None = None,
    dtype: DtypeName = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Write the edited model of a run as a Hugging Face folder.

    Args:
        run: A run folder, or a patch.safetensors.
        out: The folder to write; must be new or empty.
        base: Folder or hub name of the base model; by default the one that the run used.
        architecture: Module paths of a model family that is not recognized.
        dtype: Precision of the written weights; 'auto' keeps the model's, to which ΔW may be rounded.
        trust_remote_code: Whether Python code in the model's folder or repository may run.

    Raises:
        FileNotFoundError: If the patch or the base model does not exist.
        FileExistsError: If the folder is not empty.
        PatchError: If the base model is not the one that was edited.
    """
    from pmet_lightning.report.model_card import write_card  # seconds of imports, which --help does not wait for

    given = Path(run).expanduser()
    patch = given / "patch.safetensors" if given.is_dir() else given
    _, manifest = load_patch(patch)
    with new_folder(out, "--out") as unfinished:
        name = base or manifest["model"]
        model = load_model(name, manifest["dtype"], trust_remote_code=trust_remote_code)
        sites = Sites.of(model, architecture_of(model.config, architecture))
        base_fingerprint = fingerprint(model)  # of the weights in the precision in which they were edited
        if dtype != "auto":
            model = model.to(getattr(torch, dtype))
        apply_patch(model, sites, patch, base_fingerprint)
        save_model(model, unfinished)
        load_tokenizer(name, trust_remote_code).save_pretrained(unfinished)
        copy_processor_files(name, unfinished)
        write_card(unfinished, {**manifest, "model": name}, _scores(patch.parent / "scores.json"))
    log.info("the edited model is in %s", out)


def _scores(path: Path) -> dict[str, Any] | None:
    """The scores of a run; a patch alone has none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

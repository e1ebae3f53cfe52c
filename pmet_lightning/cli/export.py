"""The command ``export``: writes base model plus patch as a Hugging Face folder, or the patch as a LoRA adapter."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.model.adapter import save_adapter
from pmet_lightning.model.architectures import Architecture, architecture_of
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.model.generation_config import save_model
from pmet_lightning.model.loading import DtypeName, load_model
from pmet_lightning.model.origin import write_origin
from pmet_lightning.model.patch import Patch, apply_read_patch, read_patch, rounding_of
from pmet_lightning.model.projections import Sites
from pmet_lightning.model.quantized_base import convert, hold_unquantized
from pmet_lightning.solver.weight_delta import WeightDelta
from pmet_lightning.utils.files import new_folder
from pmet_lightning.utils.processor_files import copy_processor_files

log = logging.getLogger(__name__)

MUCH_LOST = 0.01  # of the norm of dW: less does not show in scores


def export(
    run: str,
    out: str,
    base: str | None = None,
    architecture: Architecture | None = None,
    dtype: DtypeName = "auto",
    trust_remote_code: bool = False,
    format: Literal["transformers", "peft"] = "transformers",
    list_facts: bool = True,
) -> None:
    """Write the edited model of a run as a Hugging Face folder, or its edits as a LoRA adapter.

    Args:
        run: A run folder, or a patch.safetensors.
        out: The folder to write; must be new or empty.
        base: Folder or hub name of the base model; by default the one that the run used.
        architecture: Module paths of a model family that is not recognized.
        dtype: Precision of the written weights; 'auto' keeps the model's, unless the run had the edited weights in
            float32 (--model.keep_float32) and more than 1 % of ΔW's norm would be rounded away: then float32.
        trust_remote_code: Whether Python code in the model's folder or repository may run.
        format: 'transformers', the whole edited model, or 'peft', a LoRA adapter for the base model, which peft and
            servers load beside it (pip install "pmet-lightning[peft]").
        list_facts: Whether the card in the folder lists the facts, or only says how many they are.

    Raises:
        FileNotFoundError: If the patch or the base model does not exist.
        FileExistsError: If the folder is not empty.
        PatchError: If the base model is not the one that was edited.
    """
    from pmet_lightning.report.model_card import write_card  # seconds of imports, which --help does not wait for

    given = Path(run).expanduser()
    patch = given / "patch.safetensors" if given.is_dir() else given
    kept = read_patch(patch)
    deltas, manifest = kept.deltas, kept.manifest
    name, scores = base or manifest["model"], _scores(patch.parent / "scores.json")
    with new_folder(out, "--out") as unfinished:
        if format == "peft":
            rank = save_adapter(unfinished, deltas, {**manifest, "model": name})
            write_card(unfinished, {**manifest, "model": name}, scores, adapter_rank=rank, list_facts=list_facts)
        else:
            _save_edited(unfinished, name, patch, kept, architecture, dtype, trust_remote_code)
            write_card(unfinished, {**manifest, "model": name}, scores, list_facts=list_facts)
    log.info("the %s is in %s", "adapter" if format == "peft" else "edited model", out)


def _save_edited(
    folder: Path,
    name: str,
    path: Path,
    patch: Patch,
    architecture: Architecture | None,
    dtype: DtypeName,
    trust_remote_code: bool,
) -> None:
    """Write the model of this name with the patch in its weights, and its tokenizer."""
    manifest = patch.manifest
    quantize = manifest.get("quantize")
    model = load_model(name, manifest["dtype"], trust_remote_code=trust_remote_code, quantize=quantize)
    sites = Sites.of(model, architecture_of(model.config, architecture))
    base_fingerprint = fingerprint(model)  # of the weights in the precision in which they were edited
    hold_unquantized(model, [name.removesuffix(".weight") for name in patch.deltas])
    convert(model, _written_dtype(model, patch.deltas, manifest, dtype))
    apply_read_patch(model, sites, patch, path, base_fingerprint)
    save_model(model, folder)
    write_origin(folder, {**manifest, "model": name}, fingerprint(model))
    load_tokenizer(name, trust_remote_code).save_pretrained(folder)
    copy_processor_files(name, folder)


def _written_dtype(
    model: torch.nn.Module, deltas: Mapping[str, WeightDelta], manifest: Mapping[str, Any], dtype: DtypeName
) -> torch.dtype:
    """The precision that a folder is written in; says what it does to ΔW.

    A folder has one precision. transformers loads a folder of several in that of its configuration, and the float32
    weights in it would be rounded then, so that all are float32 or none.
    """
    dtype_name = manifest["dtype"]
    own: torch.dtype = getattr(torch, dtype_name)
    wanted: torch.dtype = own if dtype == "auto" else getattr(torch, dtype)
    lost = rounding_of(model, deltas, wanted)
    kept_float32 = bool(manifest["settings"].get("model.keep_float32"))
    if lost <= MUCH_LOST:
        return wanted
    said = f"{str(wanted).removeprefix('torch.')} would round away {100 * lost:.1f} % of the norm of dW"
    if dtype == "auto" and kept_float32:
        log.warning("%s: all weights are written in float32; --dtype %s writes the smaller folder", said, dtype_name)
        return torch.float32
    if wanted == own and not kept_float32:
        log.info("%s, as in the run itself, whose scores are with that", said.replace("would round", "rounds"))
    else:
        log.warning("%s; --dtype float32 keeps all of it", said.replace("would round", "rounds"))
    return wanted


def _scores(path: Path) -> dict[str, Any] | None:
    """The scores of a run; a patch alone has none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

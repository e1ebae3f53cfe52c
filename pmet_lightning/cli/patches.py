"""Commands for what was edited: ``patch show``, ``verify``, ``apply``, ``remove``, ``merge``, and ``ask``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmet_lightning.cli.export import export
from pmet_lightning.editor.editor import Editor
from pmet_lightning.evaluation.generation import NEW_TOKENS, says
from pmet_lightning.model.patch import PatchError, precision_of, read_patch
from pmet_lightning.moments.store import MOMENTS_FOLDER
from pmet_lightning.run.patch_file import patch_path
from pmet_lightning.utils.types import PositiveInt

log = logging.getLogger(__name__)

_SHOWN = ("model.optimize", "model.clamp", "model.steps", "spread.lam", "spread.rule", "spread.write")


def patch_show(patch: str) -> None:
    """Show what a patch is: model, settings, edit batches, and every fact with what became of it.

    Args:
        patch: A run folder, or a patch.safetensors.

    Raises:
        FileNotFoundError: If there is none.
        PatchError: If it is not a patch, or not as it was written.
    """
    path = patch_path(patch)
    kept = read_patch(path)
    manifest = kept.manifest
    settings = {name: manifest["settings"].get(name) for name in _SHOWN}
    lines = [
        f"{path} ({path.stat().st_size / 1e6:.3g} MB, format {manifest['format']})",
        f"model: {manifest['model']} in {precision_of(manifest)}, fingerprint {manifest['fingerprint']}",
        f"edits: {manifest['edits']} in {manifest['edit_batches']} edit batches, layers {manifest['layers']}",
        "settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()),
        *(f"{name}: {_size(delta.shape, delta.rank)}" for name, delta in kept.deltas.items()),
        *map(_fact_line, manifest.get("facts", [])),
    ]
    if "facts" not in manifest:
        lines.append("an earlier version wrote it, which kept no facts")
    log.info("%s", "\n".join(lines))


def patch_verify(
    patch: str, base: str | None = None, moments_folder: str = MOMENTS_FOLDER, device: str | None = None
) -> None:
    """Check that a patch is as it was written, belongs to the base model, and does what it says.

    Args:
        patch: A run folder, or a patch.safetensors.
        base: Folder or hub name of the base model; by default the one that the patch names.
        moments_folder: The cache of second moments.
        device: Where the model is run; by default the first CUDA device, if there is one.

    Raises:
        FileNotFoundError: If patch or model do not exist.
        PatchError: If the patch was changed, belongs to another model, or facts that were said are no longer.
    """
    editor = Editor.from_patch(patch, base, moments_folder=moments_folder, device=device)
    answers = editor.ask([fact.edit.question for fact in editor.facts])
    said = [says(answer, fact.edit.target) for answer, fact in zip(answers, editor.facts, strict=True)]
    lost = [fact for fact, now in zip(editor.facts, said, strict=True) if fact.said and not now]
    log.info("as it was written, and of this model; the model says %d of %d facts", sum(said), len(said))
    if lost:
        raise PatchError(
            f"{patch_path(patch)}: {len(lost)} facts were said when they were written and are not any more, such as "
            f"{lost[0].edit.question!r}; later edits may have disturbed them: patch show lists all"
        )


def patch_apply(patch: str, out: str, base: str | None = None) -> None:
    """Write a model with a patch in its weights as a Hugging Face folder, as export does.

    Args:
        patch: A run folder, or a patch.safetensors.
        out: The folder to write; must be new or empty.
        base: Folder or hub name of the base model; by default the one that the patch names.

    Raises:
        FileNotFoundError: If patch or model do not exist.
        FileExistsError: If the folder is not empty.
        PatchError: If the patch was changed, or belongs to another model.
    """
    export(patch, out, base)


def patch_remove(
    patch: str,
    facts: str | list[str],
    out: str,
    base: str | None = None,
    moments_folder: str = MOMENTS_FOLDER,
    device: str | None = None,
) -> None:
    """Write a patch without some of its facts: the others are solved again from their kept targets.

    Args:
        patch: A run folder, or a patch.safetensors.
        facts: Which: a subject, a question with its subject filled in, or a case id; or a list of these.
        out: The patch to write; may be the old one.
        base: Folder or hub name of the base model; by default the one that the patch names.
        moments_folder: The cache of second moments, which must hold those that the patch was made with.
        device: Where the model is run; by default the first CUDA device, if there is one.

    Raises:
        FileNotFoundError: If patch, model or second moments do not exist.
        PatchError: If the patch was changed, or belongs to another model.
        ValueError: If a fact is not in the patch, or nothing would be left.
    """
    editor = Editor.from_patch(patch, base, moments_folder=moments_folder, device=device)
    before = len(editor.facts)
    editor.remove(facts)
    if not editor.facts:
        raise ValueError(f"--facts names all {before} facts of the patch: nothing would be left; use the base model")
    editor.save_patch(_file(out))
    log.info("%s holds %d facts, without %d", _file(out), len(editor.facts), before - len(editor.facts))


def patch_merge(
    patches: list[str],
    out: str,
    base: str | None = None,
    moments_folder: str = MOMENTS_FOLDER,
    device: str | None = None,
) -> None:
    """Join patches of one model: all facts are solved as one edit batch, from their kept targets.

    Args:
        patches: Run folders, or patch.safetensors files.
        out: The patch to write.
        base: Folder or hub name of the base model; by default the one that the first patch names.
        moments_folder: The cache of second moments, which must hold those that the patches were made with.
        device: Where the model is run; by default the first CUDA device, if there is one.

    Raises:
        FileNotFoundError: If a patch, the model or second moments do not exist.
        PatchError: If a patch was changed, or they are not of one model and one kind.
        RecordError: If facts contradict each other; the message names all of them.
        ValueError: If there are fewer than two patches.
    """
    if len(patches) < 2:
        raise ValueError(f"--patches: expected two or more, got {len(patches)}")
    editor = Editor.from_patch(patches[0], base, moments_folder=moments_folder, device=device)
    editor.merge(*patches[1:])
    editor.save_patch(_file(out))
    log.info("%s holds %d facts", _file(out), len(editor.facts))


def ask(
    run: str,
    prompt: str | list[str] | None = None,
    new_tokens: PositiveInt = NEW_TOKENS,
    base: str | None = None,
    device: str | None = None,
) -> None:
    """Ask the model of a run, before and after its edits.

    Args:
        run: A run folder, or a patch.safetensors.
        prompt: A complete text for the model to continue, or a list; by default the questions of all facts.
        new_tokens: Maximum number of tokens of an answer.
        base: Folder or hub name of the base model; by default the one that the run used.
        device: Where the model is run; by default the first CUDA device, if there is one.

    Raises:
        FileNotFoundError: If there is no such run or model.
        PatchError: If the patch was changed, or belongs to another model.
    """
    editor = Editor.from_patch(run, base, device=device)
    prompts = [fact.edit.question for fact in editor.facts] if prompt is None else prompt
    prompts = [prompts] if isinstance(prompts, str) else prompts
    after = editor.ask(prompts, new_tokens)
    editor.revert()
    before = editor.ask(prompts, new_tokens)
    blocks = [
        f"{asked}\n  before: {_line(old)}\n  after:  {_line(new)}"
        for asked, old, new in zip(prompts, before, after, strict=True)
    ]
    log.info("%s", "\n".join(blocks))


def _file(out: str) -> Path:
    """The patch to write: a folder stands for the patch in it."""
    path = patch_path(out)
    if path.suffix != ".safetensors":
        raise ValueError(f"--out {out}: expected a folder, or the name of a .safetensors file")
    return path


def _size(shape: tuple[int, int], rank: int | None) -> str:
    return f"{shape[0]} x {shape[1]}" + ("" if rank is None else f", rank {rank}")


def _fact_line(fact: Mapping[str, Any]) -> str:
    question = fact["prompt"].replace("{}", fact["subject"], 1)
    ended = {True: "said", False: f"says {_line(fact['answer'] or '')!r}", None: "not asked"}[fact["said"]]
    return f"{fact['case_id']} (edit batch {fact['edit_batch']}): {question} -> {fact['target']} [{ended}]"


def _line(text: str) -> str:
    """The text in one line."""
    return " ".join(text.split())

"""Commands for stored second moments: ``moments list``, ``export`` and ``import``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import cast

from pmet_lightning.moments.moment_file import MomentFile, choose, write_moment_file
from pmet_lightning.moments.store import MOMENTS_FOLDER, MomentError, stored_moments
from pmet_lightning.utils.files import check_new_file
from pmet_lightning.utils.types import NonNegativeInt

log = logging.getLogger(__name__)

_COLUMNS = ("name", "model", "site", "layer", "width", "tokens", "samples", "length", "dtype", "corpus", "path")


def moments_list(folder: str = MOMENTS_FOLDER) -> None:
    """Show the second moments that are stored.

    Args:
        folder: Where they are stored (--moments.folder of the other commands).
    """
    shown = [{**found, "corpus": found.get("corpus_name") or found.get("corpus")} for found in stored_moments(folder)]
    rows = [_COLUMNS, *(tuple(found.get(name) or "-" for name in _COLUMNS) for found in shown)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    for row in rows:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")


def moments_export(
    out: str,
    model: str | None = None,
    corpus: str | None = None,
    layers: list[NonNegativeInt] | None = None,
    folder: str = MOMENTS_FOLDER,
) -> None:
    """Write stored second moments as one file, for another machine or somebody else.

    Args:
        out: The .safetensors file to write; must not exist.
        model: Only those of this model: its name or fingerprint, as moments list shows them.
        corpus: Only those over this text, as moments list shows it.
        layers: Only those of these layers.
        folder: Where they are stored (--moments.folder of the other commands).

    Raises:
        FileExistsError: If ``out`` exists.
        MomentError: If there are none such, or one is not as it was stored.
    """
    check_new_file(out, "--out")
    chosen = choose(stored_moments(folder), model, corpus, layers)
    write_moment_file(out, chosen)
    names = {found.get("name") or found["model"] for found in chosen}
    log.info("%s holds %d second moments of %s", out, len(chosen), ", ".join(sorted(names)))


def moments_import(file: str, base: str | None = None, folder: str = MOMENTS_FOLDER) -> None:
    """Add the second moments of a file to those that are stored: all of them, or none.

    Args:
        file: A file that moments export has written.
        base: Folder or hub name of a model; nothing is added unless all moments are of its weights and tokenizer.
        folder: Where they are stored (--moments.folder of the other commands).

    Raises:
        FileNotFoundError: If file or model do not exist.
        MomentError: If the file is not such a file, not as it was written, or of another model.
    """
    found = MomentFile.read(file)
    if base is not None:
        _check_model(found, base)
    added, kept = found.add_to(folder)
    for path in sorted({path.parent for path in [*added, *kept]}):
        log.info("%s: %s", path, _described(found, path))
    log.info("%d second moments added, %d were there", len(added), len(kept))


def _check_model(found: MomentFile, base: str) -> None:
    """Refuse moments that a model would not find."""
    from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer  # seconds of imports
    from pmet_lightning.model.fingerprint import fingerprint
    from pmet_lightning.model.loading import DtypeName, load_model

    tokenizer = PromptEncoder(load_tokenizer(base)).fingerprint()
    for key in found.keys:
        model = fingerprint(load_model(base, cast(DtypeName, key.dtype)))
        if (key.model, key.tokenizer) != (model, tokenizer):
            raise MomentError(
                f"{found.path}: second moments of another model: expected weights {model} and tokenizer {tokenizer} "
                f"({base} in {key.dtype}), found {key.model} and {key.tokenizer}; nothing was added"
            )


def _described(found: MomentFile, folder: Path) -> str:
    """What a folder of the cache holds of a file's moments."""
    inside = [about for name, about in found.moments.items() if Path(name).parent.name == folder.name]
    layers = sorted({int(about["layer"]) for about in inside})
    about = inside[0]
    text = about.get("corpus_name") or about["corpus"]
    return f"{about.get('name') or about['model']} over {text} ({about['tokens']} tokens), layers {layers}"

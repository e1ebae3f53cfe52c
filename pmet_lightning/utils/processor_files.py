"""Files beside a model and its tokenizer that say how images and sounds become inputs: they belong to an export too."""

from __future__ import annotations

import shutil
from pathlib import Path

from pmet_lightning.utils.resources import locate

# As transformers names them; a tokenizer saves its own chat template.
_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def copy_processor_files(name: str, folder: str | Path) -> list[str]:
    """Copy what a base model has of these files, unless something of that name is there already.

    Args:
        name: Folder or hub name of the base model; one that cannot be found has none, nor has an empty name.
        folder: The exported model.

    Returns:
        Names of the copied files.
    """
    copied = []
    for file in _FILES:
        target = Path(folder) / file
        source = None if target.exists() or not name else _find(locate(name), file)
        if source is not None:
            shutil.copyfile(source, target)
            copied.append(file)
    return copied


def _find(name: str, file: str) -> str | None:
    """The path of a file in a folder or, without an error if it is not there, in a repository of the hub."""
    if Path(name).is_dir():
        path = Path(name) / file
        return str(path) if path.is_file() else None
    from transformers.utils import cached_file

    try:
        return cached_file(  # type: ignore[no-any-return]
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # no name of the hub, such as that of a class
        return None

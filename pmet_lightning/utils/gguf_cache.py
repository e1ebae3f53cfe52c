"""Configuration and tokenizer of a GGUF file, kept as folders: transformers needs ten seconds to parse each of them.

They are small, the weights are not; those are read from the file itself.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from pmet_lightning.utils.files import new_folder

log = logging.getLogger(__name__)

FOLDER = "~/.cache/pmet_lightning/gguf"


def load_part(auto_class: Any, file: Path, **kwargs: Any) -> Any:
    """Configuration or tokenizer of a GGUF file: from its folder, or from the file, which makes the folder.

    Args:
        auto_class: ``AutoConfig`` or ``AutoTokenizer`` of transformers.
        file: The file.
        kwargs: Further arguments of ``from_pretrained``.
    """
    folder = _folder_of(file) / auto_class.__name__
    if folder.is_dir():
        return auto_class.from_pretrained(folder, **kwargs)
    part = auto_class.from_pretrained(file.parent, gguf_file=file.name, **kwargs)
    try:
        with new_folder(folder, FOLDER) as unfinished:
            part.save_pretrained(unfinished)
    except OSError as error:  # another process was faster, or the folder cannot be written
        log.debug("not kept: %s", error)
    return part


def _folder_of(file: Path) -> Path:
    """A folder for this file as it is now, and for this version of the library that parses it."""
    import transformers

    status = file.stat()
    content = f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {transformers.__version__}"
    return Path(FOLDER).expanduser() / hashlib.sha256(content.encode()).hexdigest()[:24]

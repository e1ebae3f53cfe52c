"""Loading by a shipped name, a local folder or a hub name, with one error for whatever is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmet_lightning.utils.resources import locate


def load_pretrained(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """Load from a shipped folder, a local folder or the hub, with one error for whatever is missing."""
    path = locate(name)
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except OSError as error:
        where = "the folder has no model" if Path(path).exists() else "no such folder, and not on the hub"
        raise FileNotFoundError(
            f"cannot load {name!r} ({where}): {str(error).splitlines()[0]}. Set --model.model_name to a folder "
            "made by save_pretrained, to a hub name, or to the shipped 'atlas'."
        ) from error

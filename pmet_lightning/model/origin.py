"""Where an edited model comes from: kept in its folder, so that its second moments can be those of the base model.

An edit hardly changes the keys of general text, and collecting their second moments for every edited model anew would
take as long as for a new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmet_lightning.utils.files import write_json
from pmet_lightning.utils.resources import locate

FILE = "edited_from.json"


@dataclass(frozen=True)
class Origin:
    """The base model of an edited one.

    Attributes:
        model: Its name.
        fingerprint: Fingerprint of its weights.
        dtype: The precision they had.
    """

    model: str
    fingerprint: str
    dtype: str


def write_origin(folder: Path, manifest: Mapping[str, Any], edited_fingerprint: str) -> None:
    """Keep where an exported model comes from.

    Args:
        folder: The exported folder.
        manifest: The manifest of the patch in it.
        edited_fingerprint: Fingerprint of its weights: once they are changed, the file no longer counts.
    """
    kept = {name: manifest[name] for name in ("model", "fingerprint", "dtype")}
    write_json(folder / FILE, {**kept, "edited": edited_fingerprint})


def origin_of(name: str, edited_fingerprint: str) -> Origin | None:
    """Where the model of this name comes from; ``None`` if it is not known, or the weights are others now.

    Args:
        name: Folder or hub name.
        edited_fingerprint: Fingerprint of its weights as they are.
    """
    if not name:
        return None
    path = Path(locate(name)) / FILE
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        origin = Origin(kept["model"], kept["fingerprint"], kept["dtype"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return origin if kept.get("edited") == edited_fingerprint else None

"""What is wrong with the files of a model's folder, in words: the libraries that read them do not name the file."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PICKLE, _ZIP = b"\x80", b"PK"


def find_fault(folder: str | Path) -> str | None:
    """The first file of a model's folder that cannot be read, and why; ``None`` if all can be.

    Args:
        folder: The folder; one that is not there has no fault.
    """
    for path in sorted(Path(folder).glob("*")) if Path(folder).is_dir() else []:
        reason = _fault_of(path) if path.is_file() else None
        if reason is not None:
            return f"{path} {reason}"
    return None


def _fault_of(path: Path) -> str | None:
    with path.open("rb") as file:
        beginning = file.read(len(_LFS_POINTER))
    if beginning == _LFS_POINTER:
        return "is a Git LFS pointer, expected the file itself; fetch it with 'git lfs pull'"
    checks = {".safetensors": _safetensors_fault, ".json": _json_fault, ".bin": _checkpoint_fault}
    return checks[path.suffix](path, beginning) if path.suffix in checks else None


def _safetensors_fault(path: Path, _: bytes) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return f"is truncated or no safetensors file ({error}), expected whole weights; copy or download it again"


def _json_fault(path: Path, _: bytes) -> str | None:
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except ValueError as error:  # of either kind: no UTF-8, no JSON
        return f"is no JSON ({error}); copy or download it again"
    parts = content.get("weight_map") if isinstance(content, dict) else None
    absent = sorted({name for name in (parts or {}).values() if not (path.parent / name).is_file()})
    return f"lists {absent[0]}, which is not in the folder; copy or download that too" if absent else None


def _checkpoint_fault(path: Path, beginning: bytes) -> str | None:
    whole = zipfile.is_zipfile(path) if beginning.startswith(_ZIP) else beginning.startswith(_PICKLE)
    return None if whole else "is truncated or no file of torch.save, expected whole weights; copy or download it again"

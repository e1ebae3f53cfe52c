"""Loading by a shipped name, a local folder, a GGUF file or a hub name, with one error for whatever is missing."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pmet_lightning.utils.hub import offline_if_unreachable
from pmet_lightning.utils.resources import locate

_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")  # a folder has one of them, or is no model
_REMEDY = (
    "Set --model.model_name to a folder made by save_pretrained, to a GGUF file, to a hub name, or to the shipped "
    "'atlas'."
)
_GGUF_PACKAGES = ("gguf", "accelerate")  # transformers reads the file with the one and fills the model with the other


def load_pretrained(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """Load from a shipped folder, a local folder, a GGUF file or the hub.

    Args:
        auto_class: A class of transformers with ``from_pretrained``.
        name: A folder, a GGUF file, a hub name, a GGUF file in a hub repository (``owner/name/file.gguf``), or a
            shipped name.
        kwargs: Further arguments of ``from_pretrained``.

    Raises:
        FileNotFoundError: If there is nothing of that name.
        ImportError: If a package that reads GGUF files is not installed.
        ValueError: If the GGUF file cannot be read, or transformers does not read its architecture.
    """
    path = locate(name)
    folder, options = (
        (path, kwargs) if not is_gguf(path) else (str(Path(path).parent), _gguf_options(name, path, kwargs))
    )
    if Path(folder).is_dir() and not any((Path(folder) / file).is_file() for file in (*_FILES, Path(path).name)):
        raise FileNotFoundError(f"cannot load {name!r}: the folder has no model, expected {_FILES[0]} in it. {_REMEDY}")
    try:
        with nullcontext() if Path(folder).exists() else offline_if_unreachable():
            return auto_class.from_pretrained(folder, **options)
    except OSError as error:
        where = "the folder has no model" if Path(path).exists() else "no such folder, and not on the hub"
        raise FileNotFoundError(f"cannot load {name!r} ({where}): {str(error).splitlines()[0]}. {_REMEDY}") from error
    except (ValueError, NotImplementedError, KeyError) as error:
        if not is_gguf(path):
            raise
        raise ValueError(
            f"cannot load {name!r}: {str(error).splitlines()[0]}; expected a GGUF file of a model family that "
            "transformers reads from GGUF. For others, take a folder made by save_pretrained"
        ) from error


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return name.lower().endswith(".gguf")


def _gguf_options(name: str, path: str, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which transformers reads one file of a folder or a hub repository."""
    missing = [package for package in _GGUF_PACKAGES if find_spec(package) is None]
    if missing:
        raise ImportError(
            f'{name!r} is a GGUF file, which needs {" and ".join(missing)}: pip install "pmet-lightning[gguf]"'
        )
    return {**options, "gguf_file": Path(path).name}

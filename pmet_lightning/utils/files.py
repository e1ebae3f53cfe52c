"""Files that are replaced as a whole or not at all."""

from __future__ import annotations

import csv
import errno
import glob
import json
import os
import platform
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

# Numbers of the errors of a full disk, a spent quota, and a file that may not grow.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it when the block ends without an exception."""
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    try:
        with name_in_errors(target):
            yield temporary
            _let_others_read(temporary)
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_file(path: str | Path, option: str) -> None:
    """Refuse to overwrite a file.

    Args:
        path: The file; must not exist.
        option: Its option on the command line, for the error.

    Raises:
        FileExistsError: If there is anything of that name.
    """
    if Path(path).exists():
        raise FileExistsError(f"{option} {path}: expected a new file, but it exists; remove it or choose another name")


@contextmanager
def name_in_errors(path: str | Path, only: Container[int] | None = None) -> Iterator[None]:
    """Name the file in errors of what is written inside: Python reports a full disk without one.

    Args:
        path: The file, or the folder that it is in.
        only: Numbers of the errors that are meant, such as :data:`NO_ROOM`; all where ``None``.

    Raises:
        OSError: As it was raised inside, with a file name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None or (only is not None and error.errno not in only):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def new_folder(path: str | Path, option: str) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends without an exception.

    Args:
        path: The folder; must not exist, or must be empty.
        option: Its option on the command line, for the error.

    Raises:
        FileExistsError: If it is a file or a folder that is not empty.
    """
    folder = Path(path).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{option} {path}: expected a new or empty folder, found one that holds something")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(folder)
    unfinished.mkdir()
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_file():
                _let_others_read(path)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _beside(target: Path) -> Path:
    """A hidden path beside a file or folder, for what is to replace it, once killed processes' own are removed there.

    It is beside the target, so that the rename at the end stays on one file system and is atomic. Its name says whose
    it is: of another machine's process, on a shared disk, nobody here can tell whether it is still at work.
    """
    prefix = f".{target.name}.{platform.node()}."
    for path in target.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        process = path.name.removeprefix(prefix).removesuffix(".tmp")
        if process.isdecimal() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            _remove(path)
    return target.with_name(f"{prefix}{os.getpid()}.tmp")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _let_others_read(path: Path) -> None:
    """Give a file the usual permissions: some writers create files that only their owner can read."""
    current = os.umask(0)
    os.umask(current)
    path.chmod(0o666 & ~current)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)  # streamed, never one text in memory
        file.write("\n")


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the named columns of some rows as a table, atomically; NaN and missing values become empty cells."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: "" if value != value else value for name, value in row.items()} for row in rows)

"""What killed processes leave beside a file or folder is removed by the next one that writes it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from pmet_lightning.utils.files import atomic_path, new_folder


def write_file(path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("new")


def write_folder(path) -> None:
    with new_folder(path, "--out") as unfinished:
        (unfinished / "file").write_text("new")


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("is_folder", [False, True])
def test_what_a_killed_process_leaves_is_removed(tmp_path, write, is_folder):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here, name = platform.node(), "a[1].json"
    left = {
        f".{name}.{here}.{ended.pid}.tmp": True,
        f".{name}.{here}.{os.getpid()}.tmp": True,  # after the start of a container, numbers are given again
        f".{name}.{here}.{os.getppid()}.tmp": False,  # at work
        f".{name}.elsewhere.{ended.pid}.tmp": False,  # nobody here knows
        f".{name}.{here}.x.tmp": False,
        f".b.json.{here}.{ended.pid}.tmp": False,  # of another file
    }
    for one in left:
        if is_folder:
            (tmp_path / one / "inside").mkdir(parents=True)
        else:
            (tmp_path / one).write_text("half")
    write(tmp_path / name)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {name, *(one for one, is_removed in left.items() if not is_removed)}

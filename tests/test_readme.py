"""The README's commands, example and length cannot rot, nor the tree in CONTRIBUTING."""

from __future__ import annotations

import re
import subprocess
from ast import literal_eval

import pytest

from pmet_lightning.utils.resources import locate
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_folder_is_in_the_tree():
    tree = CONTRIBUTING.split("## Files")[1].split("```")[1]
    named = set(re.findall(r"(?:^|\s)(\w+)/", tree))
    folders = {path.parent.name for path in (ROOT / "pmet_lightning").glob("*/__init__.py")}
    assert named == folders


def test_the_readme_is_short():
    assert len(README.splitlines()) < 150


def test_ci_runs_the_readme_s_test_command():
    command = re.search(r"^pip install .*pytest$", README, re.MULTILINE)
    assert command
    assert subprocess.run(["grep", "-c", "README.md", str(ROOT / ".ci" / "run")], check=True).returncode == 0


@pytest.mark.slow
def test_the_example_is_true(tmp_path, monkeypatch, capsys):
    """With the real model, where it is installed: what was asked changes, what was not does not."""
    pytest.importorskip("gguf")
    try:
        locate("gemma-3-270m")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    exec(README.split("```python")[1].split("```")[0], {})
    shown = README.split("```text")[1].split("```")[0].strip().splitlines()
    printed = capsys.readouterr().out.splitlines()
    for expected, found in zip(map(literal_eval, shown), map(literal_eval, printed), strict=True):
        places = [re.search("Paris|Seattle", text)[0] for text in expected]
        assert [re.search("Paris|Seattle", text)[0] for text in found] == places
    assert (tmp_path / "edited" / "config.json").is_file()

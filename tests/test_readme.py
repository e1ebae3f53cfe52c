"""The README's table of equations, its configurations and its length cannot rot."""

from __future__ import annotations

import re
import subprocess

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_folder_is_in_the_tree():
    tree = README.split("## Files")[1].split("```")[1]
    named = set(re.findall(r"(?:^|\s)(\w+)/", tree))
    folders = {path.parent.name for path in (ROOT / "pmet_lightning").glob("*/__init__.py")}
    assert named == folders


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170


def test_ci_runs_the_readme_s_test_command():
    command = re.search(r"^pip install .*pytest$", README, re.MULTILINE)
    assert command
    assert subprocess.run(["grep", "-c", "README.md", str(ROOT / ".ci" / "run")], check=True).returncode == 0


def test_the_ten_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    code = README.split("```python")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("print(", "found = ("), names)
    assert names["found"] > 85
    assert names["model"].config.model_type == "gptj"
    assert not (tmp_path / "runs").exists()

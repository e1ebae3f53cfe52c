"""How the code is laid out: imports go one way, tests mirror the package, functions stay short."""

from __future__ import annotations

import ast
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "pmet_lightning"
TESTS = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "__init__.py"]
LONGEST, MEDIAN = 60, 9


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    """import-linter's verdict on the package in a folder, by its pyproject.toml."""
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())",
    ]
    return subprocess.run([*command, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


def test_imports_go_one_way():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("utils/files.py", "from pmet_lightning.data.records import Edit"),
        ("model/hooks.py", "from pmet_lightning.write import keys"),
        ("run/journal.py", "import pmet_lightning.cli.dispatch"),
    ],
)
def test_an_import_backwards_breaks_the_contract(tmp_path, file, line):
    shutil.copytree(PACKAGE, tmp_path / "pmet_lightning", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    changed = tmp_path / "pmet_lightning" / file
    changed.write_text(f"{changed.read_text()}\n\ndef backwards():\n    {line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert "BROKEN" in done.stdout


def test_every_folder_is_in_the_contract():
    contract = (ROOT / "pyproject.toml").read_text()
    for folder in PACKAGE.glob("*/__init__.py"):
        assert re.search(rf"pmet_lightning\.{folder.parent.name}\b", contract), folder


def test_tests_mirror_the_package():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")} <= folders
    untested = {folder for folder in folders if not list((ROOT / "tests" / folder).glob("test_*.py"))}
    assert untested <= {"baselines"}, "which is tested with compare"


def test_no_test_patches_a_private_name():
    for path in TESTS:
        patched = re.findall(r"(?:setattr|setitem|patch\.object)\([\w.]+, [\"'](\w+)[\"']", path.read_text())
        patched += re.findall(r"setattr\([\"'][\w.]+\.(\w+)[\"']", path.read_text())
        patched += re.findall(r"setitem\([\w.]+\.(\w+),", path.read_text())
        assert not [name for name in patched if name.startswith("_") and not name.startswith("__")], path


def functions() -> list[tuple[str, int]]:
    """Every function of the package and its lines."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((f"{path.relative_to(ROOT)}: {node.name}", node.end_lineno - node.lineno + 1))
    return found


def test_functions_are_short():
    lengths = functions()
    assert statistics.median(lines for _, lines in lengths) <= MEDIAN
    assert not [(name, lines) for name, lines in lengths if lines > LONGEST]

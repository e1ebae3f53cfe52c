"""What is asked for decides what is imported: torch and Lightning take seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import pmet_lightning

HEAVY = {"torch", "lightning", "transformers", "datasets", "torchmetrics", "sklearn", "matplotlib"}
_CODE = """
import json, sys
try:
    {code}
except SystemExit:
    pass
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""


def imported(code: str) -> set[str]:
    """The heavy packages that a line of code imports, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _CODE.format(code=code)], capture_output=True, text=True, check=True)
    return HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_imports_nothing_heavy():
    assert imported("import pmet_lightning; pmet_lightning.__version__; dir(pmet_lightning)") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["fti"], ["demo", "--help"], ["compare", "--help"],
                                       ["harness", "--help"]], ids=" ".join)  # fmt: skip
def test_help_imports_nothing_heavy(arguments):
    assert imported(f"from pmet_lightning.cli.dispatch import main; main({arguments})") == set()


@pytest.mark.parametrize("arguments", [["export", "--help"], ["analyze", "--help"], ["stats", "--list"]], ids=" ".join)
def test_file_commands_need_no_lightning(arguments):
    assert imported(f"from pmet_lightning.cli.dispatch import main; main({arguments})") == {"torch"}


def test_the_other_commands_need_no_data_sets_to_show_their_settings():
    heavy = imported("from pmet_lightning.cli.dispatch import main; main(['fit', '--help'])")
    assert "lightning" in heavy
    assert not heavy & {"datasets", "sklearn"}


def test_public_names_are_found():
    names = ["Edit", "EditDataModule", "EditReport", "EditScores", "Editor", "SecondMoments", "TargetOptimizer",
             "WeightSpread", "read_edits"]  # fmt: skip
    for name in names:
        assert getattr(pmet_lightning, name).__name__ == name
        assert name in dir(pmet_lightning)
    with pytest.raises(AttributeError, match="'pmet_lightning' has no attribute 'TargetOptimiser'"):
        _ = pmet_lightning.TargetOptimiser

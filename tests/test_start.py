"""What is asked for decides what is imported: torch and Lightning take seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import pmet_lightning
from pmet_lightning.cli.dispatch import main

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


def test_help_imports_nothing_heavy():
    """All of them in one process: none of them may."""
    commands = [["--help"], ["--version"], ["demo", "--help"], ["compare", "--help"], ["harness", "--help"]]
    code = "\n    ".join(f"with suppress(SystemExit): main({arguments})" for arguments in commands)
    assert (
        imported(f"from contextlib import suppress; from pmet_lightning.cli.dispatch import main\n    {code}") == set()
    )


def test_file_commands_need_no_lightning():
    """Four of them in one process: what one imports, the others may too."""
    commands = [["export", "--help"], ["analyze", "--help"], ["known", "--help"], ["stats", "--list"]]
    code = "\n    ".join(f"with suppress(SystemExit): main({arguments})" for arguments in commands)
    heavy = imported(f"from contextlib import suppress; from pmet_lightning.cli.dispatch import main\n    {code}")
    assert heavy <= {"torch"}


def test_the_other_commands_need_no_data_sets_to_show_their_settings():
    assert imported("from pmet_lightning.cli.dispatch import main; main(['fit', '--help'])") == set()


def test_public_names_are_found():
    assert len(pmet_lightning.__all__) > 20
    for name in pmet_lightning.__all__:
        assert name == "__version__" or getattr(pmet_lightning, name).__name__ == name
        assert name in dir(pmet_lightning)
    with pytest.raises(AttributeError, match="'pmet_lightning' has no attribute 'TargetOptimiser'"):
        _ = pmet_lightning.TargetOptimiser


def test_errors_have_one_base():
    errors = [getattr(pmet_lightning, name) for name in pmet_lightning.__all__ if name.endswith("Error")]
    assert len(errors) >= 6
    assert all(issubclass(error, pmet_lightning.PmetError) and issubclass(error, ValueError) for error in errors)


def test_the_version_is_told(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"pmet-lightning {pmet_lightning.__version__}\n"

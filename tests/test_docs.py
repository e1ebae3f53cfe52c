"""The pages of ``docs/`` cannot name what is not there; the site builds without a warning (slow, in the CI)."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module

import pytest
from jsonargparse import auto_cli, capture_parser

from pmet_lightning.analysis.verb import analyze
from pmet_lightning.cli import FILE_VERBS, TRAINER_VERBS
from pmet_lightning.editor_settings import section_parser
from tests.conftest import ROOT

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "pmet_lightning").rglob("*.py"))


@pytest.fixture(scope="module")
def options():
    analysis = capture_parser(lambda: auto_cli(analyze, args=[], as_positional=False))
    return {action.dest for parser in (section_parser(), analysis) for action in parser._actions}


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_on_a_page_exists(page, options):
    named = re.findall(r"--((?:model|data|moments|spread|drift|tracing)\.\w+)", PAGES[page])
    assert {name for name in named if name not in options} == set()


def test_the_analyses_on_the_page_do_not_share_a_folder():
    commands = re.findall(r"^python -m pmet_lightning analyze\b((?:.*\\\n)*.*)", PAGES["analysis.md"], re.MULTILINE)
    folders = [(re.findall(r"--out (\S+)", command) or ["analysis"])[0] for command in commands]
    assert len(folders) == len(set(folders)) == 3


@pytest.mark.parametrize("page", PAGES)
def test_every_link_on_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", PAGES[page]):
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_every_file_on_a_page_exists(page):
    for name in re.findall(r"`((?:tests|benchmarks|configs)/[\w./-]+\.\w+)", PAGES[page]):
        assert (ROOT / name).is_file(), name


def test_every_equation_is_where_the_page_says():
    names = re.findall(r"^\|[^|]+\| `([\w.]+)` \|$", PAGES["method.md"], re.MULTILINE)
    assert len(names) >= 15
    for name in names:
        for part in name.split("."):
            assert re.search(rf"(def|class) {part}\b", SOURCE), name


def test_what_is_generated_and_documented_exists():
    for owner, members in re.findall(r"autoclass:: ([\w.]+)\n(?:   :members: (.+)\n)?", PAGES["api.md"]):
        path, _, name = owner.rpartition(".")
        found = getattr(import_module(path or "pmet_lightning"), name)
        assert all(hasattr(found, member) for member in members.split(", ") if member), owner


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("myst_parser", reason="the extra 'docs' is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference, verbs = ((tmp_path / f"{name}.html").read_text() for name in ("reference", "verbs"))
    assert "torch.optim.Adam(lr=0.2)" in reference
    for name in (
        "model.clamp",
        "data.edit_batch",
        "moments.samples",
        "spread.lam",
        "drift.max_growth",
        "trainer.resume",
    ):
        assert f"--{name}" in reference
    assert all(f'id="{verb}"' in verbs for verb in FILE_VERBS)
    assert all(f"  {verb}" in verbs for verb in TRAINER_VERBS)

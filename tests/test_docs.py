"""The pages of ``docs/`` cannot name what is not there; the site builds without a warning (slow, in the CI)."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from jsonargparse import auto_cli, capture_parser
from lightning.pytorch.cli import LightningArgumentParser

from pmet_lightning import EditDataModule, Editor
from pmet_lightning.baselines.finetuning import FineTuning
from pmet_lightning.baselines.retrieval import Retrieval
from pmet_lightning.cli.dispatch import FILE_COMMANDS, TRAINER_COMMANDS, function_of, main
from pmet_lightning.model.architectures import ARCHITECTURES
from pmet_lightning.run.settings import add_shared_sections, section_parser
from pmet_lightning.run.trainer import EditTrainer
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.resources import locate
from tests.conftest import ROOT
from tests.tiny import RECORDS, save_tiny

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = PAGES | {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
# Configurations that are not for a model of its own.
OTHERS = (
    "pmet",
    "pmet-successive",
    "stream",
    "multi-gpu",
    "compare",
    "compare-gemma",
    "compare-constructions",
    "finetune",
    "retrieve",
)
COMMANDS = (*TRAINER_COMMANDS, *FILE_COMMANDS)


def _baseline_parser(module) -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(module, "model")
    parser.add_lightning_class_args(EditDataModule, "data")
    add_shared_sections(parser)
    return parser


@pytest.fixture(scope="module")
def options():
    """The options of each command."""
    found = {}
    for module, commands in (
        (TargetOptimizer, ("fit", "validate", "test", "stats")),
        (FineTuning, ("finetune",)),
        (Retrieval, ("retrieve",)),
    ):
        parser = section_parser() if module is TargetOptimizer else _baseline_parser(module)
        parser.add_lightning_class_args(EditTrainer, "trainer")
        dests = {action.dest for action in parser._actions} | {"config", "print_config"}
        found |= dict.fromkeys(commands, dests)
    found["stats"] = found["stats"] | {"list"}
    for command in FILE_COMMANDS:
        function = function_of(command)
        parser = capture_parser(lambda function=function: auto_cli(function, args=[], as_positional=False))
        found[command] = {action.dest for action in parser._actions}
    assert set(found) == set(COMMANDS)
    return found


def settings_in(text: str) -> set[str]:
    """Options in a text, of nested ones the first two parts: an optimizer's own settings are not the parser's."""
    return set(re.findall(r"(?<![\w-])--(\w+(?:\.\w+)?)", text))


def commands(page: str) -> list[tuple[str, str]]:
    """Commands and what follows them: in lines of code, and in words set as code that begin with a command."""
    text, commands = page.replace("\\\n", " "), "|".join(COMMANDS)
    blocks = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.split(" #")[0] for block in blocks for line in block.splitlines()]
    found = [re.search(rf"(?:-m pmet_lightning|pmet-lightning) ({commands})\b(.*)", line) for line in lines]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    found += [
        re.search(rf"(?:^|-m pmet_lightning |pmet-lightning )({commands})(?= --| *$)(.*)", span) for span in spans
    ]
    return [(match[1], match[2]) for match in found if match]


@pytest.mark.parametrize("page", TEXTS)
def test_every_setting_on_a_page_exists(page, options):
    everywhere = set().union(*options.values())
    assert {name for name in settings_in(TEXTS[page]) if "." in name} - {"section.name"} <= everywhere


@pytest.mark.parametrize("page", TEXTS)
def test_every_setting_is_one_of_the_command_that_it_stands_with(page, options):
    for command, rest in commands(TEXTS[page]):
        assert settings_in(rest) <= options[command], (command, rest)
    for line in TEXTS[page].splitlines():
        named = {command for command, rest in commands(line) if not rest}  # one with options has them beside it
        if len(named) == 1:
            assert {name for name in settings_in(line) if "." in name} <= options[named.pop()], line


def test_commands_are_found(options):
    code = "python -m pmet_lightning fit --data.path x \\\n  --a.b 1 # --c"
    text = f"a `fit --model.clamp 1`, `stats` b\n```sh\n{code}\n```"
    found = commands(text)
    assert [(command, settings_in(rest)) for command, rest in found] == [
        ("fit", {"data.path", "a.b"}), ("fit", {"model.clamp"}), ("stats", set())
    ]  # fmt: skip
    assert sum(len(commands(page)) for page in TEXTS.values()) > 30
    assert "spread.lam" in options["fit"]
    assert not {"spread.lam", "moments.corpus"} & options["finetune"]
    assert "data.least" in options["analyze"] - options["fit"]


def test_the_analyses_on_the_page_do_not_share_a_folder():
    commands = re.findall(r"^pmet-lightning analyze\b((?:.*\\\n)*.*)", PAGES["analysis.md"], re.MULTILINE)
    folders = [(re.findall(r"--out (\S+)", command) or ["analysis"])[0] for command in commands]
    assert len(folders) == len(set(folders)) == 3


@pytest.mark.parametrize("page", PAGES)
def test_every_link_on_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", PAGES[page]):
        assert (ROOT / "docs" / target).exists(), target


SOURCES = [
    path
    for pattern in ("*.md", ".ci/run", "Makefile", "pyproject.toml", "docs/*.md", "docs/**/*.py", "configs/*.yaml",
                    "pmet_lightning/**/*.py", "pmet_lightning/**/*.jinja", "tests/**/*.py", "tests/golden/*.md",
                    "benchmarks/*.py", "notebooks/*.ipynb", "notebooks/*.md")
    for path in sorted(ROOT.glob(pattern))
]  # fmt: skip
FOLDERS = "docs|tests|benchmarks|configs|notebooks|pmet_lightning"
# What a run leaves or what Git does not keep has names of its own, without one of these folders in front.
NAMED = re.compile(
    rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]*\w\.(?:md|py|yaml|ipynb|npz|txt|png|json|jinja)|[A-Z_]{{3,}}\.md)\b"
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_named_exists(source):
    """In code, configurations, pages and notebooks: nothing that does not ship is cited."""
    for name in NAMED.findall(source.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file() or (source.parent / name).is_file(), name


def test_names_of_files_are_found():
    text = "see docs/method.md, ../shared/data/x.md, `tests/write/test_golden.py`, METHOD" + ".md and ./configs/a.yaml"
    assert NAMED.findall(text) == ["docs/method.md", "tests/write/test_golden.py", "METHOD" + ".md"]


def definitions(path: Path) -> set[str]:
    """Names of the functions and classes of a module, and of what is in a class as Class.name."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("page", "least"), [("method.md", 28), ("evaluation.md", 8)])
def test_every_equation_is_where_the_page_says(page, least):
    rows = re.findall(r"\| `([\w/]+\.py)` \| `([\w.]+)` \|$", TEXTS[page], re.MULTILINE)
    assert len(rows) >= least
    for file, name in rows:
        assert name in definitions(ROOT / "pmet_lightning" / file), (file, name)
    assert not {"TargetLoop.residual_share", "iterate"} & definitions(ROOT / "pmet_lightning/targets/loop.py")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_choice_that_is_cited_is_on_the_page(source):
    last = max(map(int, re.findall(r"^(\d+)\. \*\*", PAGES["method.md"], re.MULTILINE)))
    assert last >= 7
    for number in re.findall(r"docs/method\.md, choices? (\d+)", source.read_text(encoding="utf-8")):
        assert 1 <= int(number) <= last


def test_the_list_of_families_is_that_of_the_program():
    table = PAGES["models.md"].split("## Families")[1].split("##")[0]
    rows = re.findall(r"^\| [^|]+ \| (`.+`) \|$", table, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row) if name != "model_type"]
    assert sorted(named) == sorted(ARCHITECTURES)


def test_the_tutorial_does_what_it_says(tmp_path, monkeypatch, capsys):
    """Its Python from the first line to the last, in an empty folder and home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGES["tutorial.md"], re.MULTILINE | re.DOTALL))
    names: dict = {}
    exec(code, names)
    before, *report, after = capsys.readouterr().out.splitlines()
    assert "golf" in before
    assert report[0] == "1 edits written in 1 edit batch"
    assert "water polo" in after
    assert (tmp_path / "edited" / "config.json").is_file()
    assert (tmp_path / "patch.safetensors").is_file()
    assert "golf" in names["editor"].ask("Clara Prilforth became a champion of")[0], "the last call was taken back"


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """An empty folder and home with what the guide takes as given: facts.json and text.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("facts.json").write_text(json.dumps(RECORDS[:2]))
    Path("text.txt").write_text("\n".join(f"This is the text of number {i}, and it is short." for i in range(40)))
    return tmp_path


def lines_of(page: str, first: str) -> list[list[str]]:
    """The words of the commands on a page that begin with one of some commands."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words[1:] for words in lines if words[0] == "pmet-lightning" and re.fullmatch(first, words[1])]


def run_all(commands: list[list[str]], **replaced: str) -> None:
    for words in commands:
        main([replaced.get(word.replace("-", "_"), word) for word in words])


@pytest.mark.slow
def test_the_guide_for_ones_own_model_does_what_it_says(walk, capsys):
    """From the first run to the exported model, with a model that it knows nothing about."""
    commands = lines_of("own-model.md", "fit|stats|export|validate")
    assert [words[0] for words in commands] == ["fit", "stats", "fit", "export", "validate"]
    run_all(commands, FOLDER=save_tiny("llama", walk / "tiny"))
    state = json.loads(Path("run/state.json").read_text())
    assert (state["status"], state["verdict"]["facts"]) == ("finished", 2)
    assert Path("first/report.html").is_file()
    asked, edited = re.findall(r"^```python\n(.*?)^```", PAGES["own-model.md"], re.MULTILINE | re.DOTALL)
    capsys.readouterr()
    exec(asked, {})
    assert "Clara Prilforth plays the sport of" in capsys.readouterr().out
    names = {"model": str(walk / "tiny"), "tokenizer": None, "facts": RECORDS[:2]}
    exec(edited, names)
    assert len(names["report"].edits) == 2


@pytest.mark.slow
def test_the_guide_finds_the_layers_of_a_model_that_knows_something(walk, caplog):
    commands = lines_of("own-model.md", "known|analyze")
    assert [words[0] for words in commands] == ["known", "analyze"]
    caplog.set_level("INFO", "pmet_lightning")
    world = {"FOLDER": locate("atlas"), "earth_records": "atlas-records", "100": "10"}
    run_all(commands, **world)
    assert "to edit the proposed layers, give fit: --model.layers" in caplog.text
    assert Path("layers/analysis.html").is_file()


def test_the_guide_lists_every_configuration_of_a_model():
    listed = set(re.findall(r"`([\w.-]+\.yaml)`", PAGES["own-model.md"]))
    shipped = {path.name for path in (ROOT / "configs").glob("*.yaml") if path.stem not in OTHERS}
    assert {name.replace("zsre", "counterfact") for name in shipped} <= listed
    assert listed <= {*shipped, "mine.yaml"}


@pytest.mark.parametrize("page", PAGES)
def test_python_on_a_page_is_python_with_settings_that_exist(page, options):
    """Blocks that need a model of the reader's own cannot be run; their calls of the editor are looked at."""
    named = {dest.removeprefix("model.") for dest in options["fit"] if dest.startswith("model.")}
    named |= set(inspect.signature(Editor.__init__).parameters)
    for block in re.findall(r"^```python\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL):
        for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id == "Editor":
                assert {keyword.arg for keyword in call.keywords if keyword.arg} <= named
            elif isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "editor":
                method = getattr(Editor, call.func.attr)
                assert {keyword.arg for keyword in call.keywords} <= set(inspect.signature(method).parameters)


def test_what_is_generated_and_documented_exists():
    for owner, members in re.findall(r"auto(?:class|function):: ([\w.]+)\n(?:   :members: (.+)\n)?", PAGES["api.md"]):
        path, _, name = owner.rpartition(".")
        found = getattr(import_module(path or "pmet_lightning"), name)
        assert all(hasattr(found, member) for member in members.split(", ") if member), owner


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("myst_parser", reason="the extra 'docs' is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference, commands = ((tmp_path / f"{name}.html").read_text() for name in ("reference", "commands"))
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
    assert all(f'id="{command.replace(" ", "-")}"' in commands for command in FILE_COMMANDS)
    assert all(f"  {command}" in commands for command in TRAINER_COMMANDS)

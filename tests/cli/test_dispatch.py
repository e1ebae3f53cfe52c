"""The command line: what is wrong with it is told at once, in one sentence, before anything heavy is imported."""

from __future__ import annotations

import inspect
import json

import lightning as L
import pytest

from pmet_lightning.cli.arguments import check_arguments
from pmet_lightning.cli.dispatch import FILE_COMMANDS, TRAINER_COMMANDS, main
from pmet_lightning.cli.help import help_of
from pmet_lightning.cli.make_options import make_options
from pmet_lightning.editor.names import as_arguments
from pmet_lightning.run.options import FILE, UsageError, options_of
from pmet_lightning.run.trainer import EditTrainer
from pmet_lightning.run.trainer_arguments import ARGUMENTS
from pmet_lightning.utils import hub
from tests.conftest import ROOT

FIT = ["--config", "pmet.yaml"]


def test_the_file_of_options_is_what_the_parsers_have():
    assert json.loads(FILE.read_text()) == json.loads(json.dumps(make_options())), (
        "make it again with python -m pmet_lightning.cli.make_options"
    )


PROBLEMS = {
    "--modle.layers [1]": "there is no option --modle.layers: did you mean --model.layers?",
    "--model.clam 3": "there is no option --model.clam: did you mean --model.clamp?",
    "--clamp 3": "there is no option --clamp: did you mean --model.clamp?",
    "--data.limit five": "--data.limit is five, expected a whole number above 0 or null",
    "--model.layers 0,1": '--model.layers is 0,1, expected a list such as "[0, 1]" or auto',
    "--model.clamp -3": "--model.clamp is -3, expected a number above 0",
    "--data.limit": "--data.limit has no value, expected a whole number above 0 or null",
    "--model.layers 0 1": "unexpected '1' after --model.layers 0",
    "--trainer.max_epochs 3": "--trainer.max_epochs 3 is refused: a run is one pass over the edits",
    "--trainer.limit_train_batches 0": "--data.limit takes fewer edits",
    "--trainer.gradient_clip_val 1": "each delta is bounded by --model.clamp",
}


@pytest.mark.parametrize("given", PROBLEMS)
def test_a_problem_is_one_sentence(given):
    with pytest.raises(UsageError) as caught:
        main(["fit", *FIT, *given.split(" ")])
    assert PROBLEMS[given] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_command_and_a_configuration_are_suggested():
    with pytest.raises(UsageError, match=r"did you mean fit\?"):
        main(["fti"])
    with pytest.raises(FileNotFoundError, match=r"did you mean pmet.yaml\?"):
        main(["fit", "--config", "pmt.yaml"])
    with pytest.raises(FileNotFoundError, match=r"did you mean qwen2.5.yaml\?"):
        main(["fit", "--config", "qwen2.5-1.5b.yaml"])
    with pytest.raises(UsageError, match="fit needs --model.model_name and --data.path.*llama-3-8b.yaml"):
        main(["fit"])


def test_keys_of_a_configuration_are_checked(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("spread:\n  lamb: 3\n")
    with pytest.raises(UsageError, match=r"mine.yaml: there is no setting spread.lamb: did you mean spread.lam\?"):
        main(["fit", *FIT, "--config", str(path)])
    path.write_text("spread: [\n")
    with pytest.raises(UsageError, match="line 2: not valid YAML"):
        main(["fit", *FIT, "--config", str(path)])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_ships_passes(path):
    kind = path.stem.split("-")[0]
    command = kind if kind in ("compare", "finetune", "retrieve") else "fit"
    own = ["--model.model_name=a-folder", "--data.path=facts.json"] if path.name == "your-model.yaml" else []
    assert check_arguments(command, ["--config", path.name, *own]) == [f"--config={path}", *own]


def test_every_argument_of_the_trainer_is_in_the_table():
    assert set(ARGUMENTS) == set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    shown = help_of("fit", "edit", "trainer")
    assert all(f"--trainer.{name}\n" in shown for name, one in ARGUMENTS.items() if one.shown or one.allowed)


@pytest.mark.parametrize("command", [*TRAINER_COMMANDS, *FILE_COMMANDS])
def test_every_command_has_help(command, capsys):
    main([command, "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in options_of(command) if not name.startswith("trainer."))


def test_the_trainer_refuses_too(tmp_path):
    with pytest.raises(ValueError, match="max_epochs 2 is refused"):
        EditTrainer(str(tmp_path), max_epochs=2)


def test_the_editor_names_its_arguments():
    text = "set --model.keep_float32 true, --model.layers, --spread.lam, --data.path or --data.skip"
    assert as_arguments(text) == "set keep_float32=True, layers, lam, facts or data={'skip': …}"


def test_an_unreachable_hub_is_told_at_once(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "getproxies", dict)
    with pytest.raises(ConnectionError, match=r"127.0.0.1 cannot be reached"):
        hub.check_reachable()

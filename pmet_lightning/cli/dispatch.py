"""The command line: selects and runs a command, and imports only what the command or its help needs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version

from pmet_lightning.cli.arguments import check_arguments
from pmet_lightning.cli.help import help_of
from pmet_lightning.run.options import UsageError, did_you_mean
from pmet_lightning.utils.console import quieten, start_log

log = logging.getLogger(__name__)

# Commands that are a function of the same name, with the module of the function.
FILE_COMMANDS = {
    "export": "pmet_lightning.cli.export",
    "convert": "pmet_lightning.cli.convert",
    "demo": "pmet_lightning.demo",
    "tune": "pmet_lightning.tune.command",
    "compare": "pmet_lightning.compare.command",
    "harness": "pmet_lightning.cli.lm_eval",
    "analyze": "pmet_lightning.analysis.command",
    "known": "pmet_lightning.analysis.known",
    "ask": "pmet_lightning.cli.patches",
    "patch show": "pmet_lightning.cli.patches",
    "patch verify": "pmet_lightning.cli.patches",
    "patch apply": "pmet_lightning.cli.patches",
    "patch remove": "pmet_lightning.cli.patches",
    "patch merge": "pmet_lightning.cli.patches",
    "moments list": "pmet_lightning.cli.moments",
    "moments export": "pmet_lightning.cli.moments",
    "moments import": "pmet_lightning.cli.moments",
}
_GROUPS = {command.partition(" ")[0] for command in FILE_COMMANDS if " " in command}
TRAINER_COMMANDS = ("fit", "validate", "test", "stats", "finetune", "retrieve")
PROGRAM = "pmet-lightning"
_TEXTS = {
    "tune": "find the settings for a model: its layers, how targets are found, how they are written",
    "fit": "edit a model: optimize target vectors, update the weights, evaluate before and after",
    "validate": "evaluate a model on the questions of the edits (with --model.patch: an edited model)",
    "test": "the same as validate",
    "stats": "collect the second moments of the keys of the edited layers (--list: moments list)",
    "finetune": "the fine-tuning baseline: train one weight matrix on the edits",
    "retrieve": "the baseline without an edit: ask with the new fact in the prompt",
    "compare": "run several methods on the same records, and compare their Scores on one page",
    "analyze": "find where a model keeps its facts, before and after an edit, and which layers to edit",
    "known": "keep the records whose old object a model knows",
    "export": "write the edited model of a run as a Hugging Face folder",
    "ask": "ask the model of a run, before and after its edits",
    "patch show": "show what a patch holds: model, settings, every fact",
    "patch verify": "check that a patch is whole, belongs to the model, and does what it says",
    "patch apply": "write a model with a patch in its weights as a Hugging Face folder",
    "patch remove": "write a patch without some of its facts",
    "patch merge": "join patches of one model into one",
    "moments list": "show the second moments that are stored",
    "moments export": "write stored second moments as one file, to hand on",
    "moments import": "add the second moments of such a file to those that are stored",
    "convert": "turn settings of EasyEdit, MEMIT, ROME or AlphaEdit into a configuration",
    "harness": "evaluate an exported model with lm-evaluation-harness",
    "demo": "rebuild the bundled Atlas world and its model from a seed",
}
_LINES = "\n".join(f"  {command:14} {text}" for command, text in _TEXTS.items())
USAGE = f"""usage: {PROGRAM} COMMAND [--config FILE] [options]

{_LINES}

COMMAND --help lists the options of a command; COMMAND --config FILE --print_config shows its settings.
{PROGRAM} --version shows the version; python -m pmet_lightning is the same program."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        arguments: The command and its options; by default those of the process.

    Raises:
        ValueError: If the command, an option or a value is not valid; the message is one sentence.
        FileNotFoundError: If a configuration does not exist.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in _GROUPS and rest and not rest[0].startswith("-"):
        command, rest = f"{command} {rest[0]}", rest[1:]
    if command == "stats" and "--list" in rest:
        command, rest = "moments list", [word for word in rest if word != "--list"]
    if command in ("-h", "--help"):
        sys.stdout.write(USAGE + "\n")
    elif command == "--version":
        sys.stdout.write(f"{PROGRAM} {version(PROGRAM)}\n")
    elif command not in (*TRAINER_COMMANDS, *FILE_COMMANDS):
        asked = did_you_mean(command, [*TRAINER_COMMANDS, *FILE_COMMANDS])
        raise UsageError(f"unknown command {command!r}: {asked or 'pmet-lightning --help lists the commands'}")
    elif any(word in ("-h", "--help") or word.startswith("--help=") for word in rest):
        sys.stdout.write(_help(command, rest) + "\n")
    else:
        _run(command, rest)


def _help(command: str, rest: Sequence[str]) -> str:
    """The help of a command, or of one of its sections."""
    asked = next(i for i, word in enumerate(rest) if word.startswith(("-h", "--help")))
    _, _, section = rest[asked].partition("=")
    if not section and len(rest) > asked + 1 and not rest[asked + 1].startswith("-"):
        section = rest[asked + 1]
    return help_of(command, _TEXTS[command], section or None)


def _run(command: str, rest: list[str]) -> None:
    start_log()
    checked = check_arguments(command, rest)
    if command in FILE_COMMANDS:
        _call(function_of(command), checked)
        return
    if "--print_config" not in rest:
        log.info("%s: loading PyTorch and Lightning, which takes some seconds", command)
    from pmet_lightning.run.lightning_cli import run_command  # seconds of imports

    quieten()
    run_command(command, checked)


def function_of(command: str) -> Callable[..., None]:
    """The function of a command that is one."""
    function: Callable[..., None] = getattr(import_module(FILE_COMMANDS[command]), command.replace(" ", "_"))
    return function


def _call(function: Callable[..., None], arguments: Sequence[str]) -> None:
    from jsonargparse import auto_cli

    auto_cli(
        function, args=list(arguments), as_positional=False, prog=f"{PROGRAM} {function.__name__.replace('_', ' ')}"
    )

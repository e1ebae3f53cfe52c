"""The command line: selects and runs a command, and imports only what the command or its help needs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version

from pmet_lightning.utils.resources import locate_config

# Commands that are a function of the same name, with the module of the function.
FILE_COMMANDS = {
    "export": "pmet_lightning.cli.export",
    "demo": "pmet_lightning.demo",
    "compare": "pmet_lightning.compare.command",
    "harness": "pmet_lightning.cli.lm_eval",
    "analyze": "pmet_lightning.analysis.command",
    "known": "pmet_lightning.analysis.known",
}
TRAINER_COMMANDS = ("fit", "validate", "test", "stats", "finetune", "retrieve")
PROGRAM = "pmet-lightning"
USAGE = f"""usage: {PROGRAM} COMMAND [--config FILE] [options]

  fit       edit a model: optimize target vectors, update the weights, evaluate before and after
  validate  evaluate a model on the questions of the edits (with --model.patch: an edited model)
  test      the same as validate
  stats     collect the second moments of the keys of the edited layers (--list: show the stored ones)
  finetune  the fine-tuning baseline: train one weight matrix on the edits
  retrieve  the baseline without an edit: ask with the new fact in the prompt
  compare   run several methods on the same records, and write one table and one plot
  analyze   find where a model keeps its facts, before and after an edit, and which layers to edit
  known     keep the records whose old object a model knows
  export    write the edited model of a run as a Hugging Face folder
  harness   evaluate an exported model with lm-evaluation-harness
  demo      rebuild the bundled Atlas world and its model from a seed

COMMAND --help lists the options of a command; COMMAND --config FILE --print_config shows its settings.
{PROGRAM} --version shows the version; python -m pmet_lightning is the same program."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        arguments: The command and its options; by default those of the process.

    Raises:
        SystemExit: With code 2 if the command is unknown.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        sys.stdout.write(USAGE + "\n")
    elif command == "--version":
        sys.stdout.write(f"{PROGRAM} {version(PROGRAM)}\n")
    elif command == "stats" and "--list" in arguments:
        from pmet_lightning.moments.store import list_moments

        _call(list_moments, [a for a in arguments[1:] if a != "--list"])
    elif command in FILE_COMMANDS:
        _start_log(arguments)
        _call(getattr(import_module(FILE_COMMANDS[command]), command), _locate_configs(arguments[1:]))
    elif command in TRAINER_COMMANDS:
        _start_log(arguments)
        from pmet_lightning.run.lightning_cli import run_command  # seconds of imports

        run_command(command, _locate_configs(arguments[1:]))
    else:
        sys.stderr.write(f"unknown command {command!r}\n{USAGE}\n")
        raise SystemExit(2)


def _start_log(arguments: Sequence[str]) -> None:
    """Log messages without a prefix; of several processes, only the first logs information.

    If the command uses Lightning, Lightning is imported first: imported afterwards, it logs its own messages twice.
    """
    level = logging.INFO
    if arguments[0] not in ("export", "harness", "analyze", "known") and "--help" not in arguments:
        from lightning.pytorch.utilities import rank_zero_only

        level = logging.WARNING if rank_zero_only.rank else logging.INFO
    logging.basicConfig(level=level, format="%(message)s")


def _call(function: Callable[..., None], arguments: Sequence[str]) -> None:
    from jsonargparse import auto_cli

    auto_cli(function, args=list(arguments), as_positional=False, prog=f"{PROGRAM} {function.__name__}")


def _locate_configs(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the names of shipped configurations replaced by their paths."""
    located = list(arguments)
    for i, argument in enumerate(located):
        if argument in ("--config", "-c") and i + 1 < len(located):
            located[i + 1] = locate_config(located[i + 1])
        elif argument.startswith("--config="):
            located[i] = f"--config={locate_config(argument.removeprefix('--config='))}"
    return located

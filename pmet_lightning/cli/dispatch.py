"""The command line: which command is meant. Nothing is imported here that a command, or its help, can do without."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version

from pmet_lightning.utils.resources import locate_config

# Commands that are a function of the same name, and its module.
FILE_COMMANDS = {
    "export": "pmet_lightning.cli.export",
    "demo": "pmet_lightning.demo",
    "compare": "pmet_lightning.compare.command",
    "harness": "pmet_lightning.cli.lm_eval",
    "analyze": "pmet_lightning.analysis.command",
}
TRAINER_COMMANDS = ("fit", "validate", "test", "stats", "finetune")
PROGRAM = "pmet-lightning"
USAGE = f"""usage: {PROGRAM} COMMAND [--config FILE] [options]

  fit       optimize targets, write the weights, evaluate before and after
  validate  evaluate a model on the questions of the edits (with --model.patch: an edited one)
  test      the same as validate
  stats     collect the second moments of the edited layers (--list: show what is kept)
  finetune  the baseline: train one matrix on the edits instead
  compare   run several methods on the same records: one table, one plot
  analyze   look into a model: where its facts are, before and after an edit; which layers to edit
  export    write the edited model of a run as a Hugging Face folder
  harness   hand an exported model to lm-evaluation-harness
  demo      rebuild the embedded world and its model from a seed

COMMAND --help lists the options of a command; COMMAND --config FILE --print_config shows its settings.
{PROGRAM} --version shows the version; python -m pmet_lightning is the same program."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; every expected error is one message and exit code 2."""
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
    """Show messages as they are, and of several processes those of the first.

    Lightning, where a command uses it, is imported before: after, it shows its own twice.
    """
    level = logging.INFO
    if arguments[0] not in ("export", "harness", "analyze") and "--help" not in arguments:
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

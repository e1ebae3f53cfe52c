"""The command line: Lightning's own CLI for what needs model, data and devices, functions for the rest."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from jsonargparse import auto_cli
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from pmet_lightning.comparison import compare
from pmet_lightning.data import EditDataModule
from pmet_lightning.demo import demo
from pmet_lightning.drift import Drift
from pmet_lightning.editable import EditableModel
from pmet_lightning.export import export
from pmet_lightning.finetuning import FineTuning
from pmet_lightning.harness import harness
from pmet_lightning.module import TargetOptimizer
from pmet_lightning.moments import stored_moments
from pmet_lightning.resources import locate_config
from pmet_lightning.spread import WeightSpread
from pmet_lightning.stats import MOMENTS_FOLDER, SecondMoments
from pmet_lightning.trainer import EditTrainer

FILE_VERBS = {"export": export, "demo": demo, "compare": compare, "harness": harness}
TRAINER_VERBS = ("fit", "validate", "test", "stats", "finetune")
USAGE = """usage: python -m pmet_lightning VERB [--config FILE] [options]

  fit       optimise targets, write the weights, evaluate before and after
  validate  evaluate a model on the questions of the edits (with --model.patch: an edited one)
  test      the same as validate
  stats     collect the second moments of the edited layers (--list: show what is kept)
  finetune  the baseline: train one matrix on the edits instead
  compare   run several methods on the same records: one table, one plot
  export    write the edited model of a run as a Hugging Face folder
  harness   hand an exported model to lm-evaluation-harness
  demo      rebuild the embedded world and its model from a seed

VERB --help lists the options of a verb; VERB --config FILE --print_config shows its settings."""


class FineTuningCLI(LightningCLI):
    """Lightning's CLI for the baseline, which needs neither second moments nor a spread."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Section ``drift``, and the values that two owners share."""
        parser.add_lightning_class_args(Drift, "drift")
        parser.link_arguments("model.model_name", "data.tokenizer")
        parser.link_arguments("model.chat", "data.chat")


class EditCLI(FineTuningCLI):
    """The same with the callbacks of editing as sections of their own."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Verbs that need model, data and devices."""
        hidden = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        return {
            "fit": hidden,
            "validate": hidden,
            "test": hidden,
            "stats": {"model", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sections ``moments`` and ``spread`` too."""
        parser.add_lightning_class_args(SecondMoments, "moments")
        parser.add_lightning_class_args(WeightSpread, "spread")
        super().add_arguments_to_parser(parser)
        parser.link_arguments("spread.write", "moments.write")


class SaveFitConfig(SaveConfigCallback):
    """Stores ``config.yaml`` in the run folder of a fit; other verbs leave no folder."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Save only what belongs to a run."""
        if stage == "fit" and trainer.max_epochs != 0:
            super().setup(trainer, pl_module, stage)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; every expected error is one message and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        sys.stdout.write(USAGE + "\n")
    elif verb == "stats" and "--list" in arguments:
        auto_cli(list_moments, args=[a for a in arguments[1:] if a != "--list"], as_positional=False)
    elif verb in FILE_VERBS:
        auto_cli(FILE_VERBS[verb], args=_with_located_configs(arguments[1:]), as_positional=False)
    elif verb in TRAINER_VERBS:
        edit_cli(arguments)
    else:
        sys.stderr.write(f"unknown verb {verb!r}\n{USAGE}\n")
        raise SystemExit(2)


def list_moments(folder: str = MOMENTS_FOLDER) -> None:
    """Show the second moments that are kept.

    Args:
        folder: Where they are kept (--moments.folder of the other verbs).
    """
    columns = ("model", "site", "layer", "width", "tokens", "samples", "length", "dtype", "corpus", "path")
    rows = [columns, *(tuple(found.get(name, "-") for name in columns) for found in stored_moments(folder))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")


def edit_cli(arguments: Sequence[str], run: bool = True) -> LightningCLI:
    """Build the CLI of a verb, and run the verb unless ``run`` is false."""
    # Configuration names are completed first, so the arguments cannot be left to sys.argv.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    arguments = _with_located_configs(arguments)
    kind: type[FineTuningCLI] = EditCLI
    module: type[EditableModel] = TargetOptimizer
    if arguments[:1] == ["finetune"]:
        kind, module = FineTuningCLI, FineTuning
        arguments[:1] = ["fit"] if run else []
    return kind(
        module,
        EditDataModule,
        trainer_class=EditTrainer,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},  # the trainer has made sure that no other run is there
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"allow_abbrev": False, **{verb: {"allow_abbrev": False} for verb in kind.subcommands()}},
        args=arguments,
        run=run,
    )


def _with_located_configs(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the names of shipped configurations replaced by their paths."""
    located = list(arguments)
    for i, argument in enumerate(located):
        if argument in ("--config", "-c") and i + 1 < len(located):
            located[i + 1] = locate_config(located[i + 1])
        elif argument.startswith("--config="):
            located[i] = f"--config={locate_config(argument.removeprefix('--config='))}"
    return located

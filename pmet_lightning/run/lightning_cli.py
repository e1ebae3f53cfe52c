"""Lightning's CLI, for the commands that need model, data and devices; and the same from Python."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from pmet_lightning.baselines.finetuning import FineTuning
from pmet_lightning.baselines.retrieval import Retrieval
from pmet_lightning.data.datamodule import EditDataModule
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.run.options import UsageError, check_settings
from pmet_lightning.run.settings import add_editing_sections, add_shared_sections
from pmet_lightning.run.trainer import EditTrainer
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.resources import locate_config

FitCommand = Literal["fit", "finetune", "retrieve"]


class SingleCommandCLI(LightningCLI):
    """Lightning's CLI with one command only: parsing the signatures takes as long for each command that it has.

    Args:
        command: The command.
        arguments: Positional arguments of Lightning's CLI.
        named: Keyword arguments of Lightning's CLI.
    """

    HIDDEN: ClassVar[set[str]] = {
        *("model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"),
        *("ckpt_path", "weights_only", "verbose"),  # a run has no checkpoints; it shows its own table
    }
    COMMANDS: ClassVar[dict[str, set[str]]] = {}
    MODULE: ClassVar[type[EditableModel]] = EditableModel

    def __init__(self, command: str, *arguments: Any, **named: Any) -> None:
        self._command = command
        super().__init__(*arguments, **named)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning asks the instance
        """The command, and the arguments of the trainer's method that are not options."""
        return {self._command: self.COMMANDS[self._command]}


class FineTuningCLI(SingleCommandCLI):
    """The CLI of the baseline, which needs neither second moments nor a write."""

    COMMANDS: ClassVar[dict[str, set[str]]] = {"fit": SingleCommandCLI.HIDDEN}
    MODULE: ClassVar[type[EditableModel]] = FineTuning

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As :func:`~pmet_lightning.run.settings.add_shared_sections`."""
        add_shared_sections(parser)


class RetrievalCLI(FineTuningCLI):
    """The CLI of the baseline that changes no weight."""

    MODULE = Retrieval


class EditCLI(SingleCommandCLI):
    """The CLI of editing, whose callbacks have sections of their own."""

    COMMANDS: ClassVar[dict[str, set[str]]] = {
        **dict.fromkeys(("fit", "validate", "test"), SingleCommandCLI.HIDDEN),
        "stats": {"model", "datamodule"},
    }
    MODULE = TargetOptimizer

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As :func:`~pmet_lightning.run.settings.add_editing_sections`."""
        add_editing_sections(parser)


class SaveFitConfig(SaveConfigCallback):
    """Stores ``config.yaml`` in the run folder of a fit; other commands leave no folder."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Save only for a fit with epochs."""
        if stage == "fit" and trainer.max_epochs != 0:
            super().setup(trainer, pl_module, stage)


def run_command(command: str, arguments: Sequence[str]) -> LightningCLI:
    """Run a command of the command line.

    Args:
        command: Its name.
        arguments: Arguments that follow it; configurations are given as paths.

    Raises:
        ValueError: If there is no such command, or something is wrong with an argument.
    """
    cli, name = _cli_of(command)
    return _build(cli, name, [name, *arguments], run=True)


def build_fit(config: str, overrides: Mapping[str, Any] | None = None, command: FitCommand = "fit") -> LightningCLI:
    """The trainer, module and data of a fit, before anything is loaded.

    Args:
        config: A configuration: a file or the name of a shipped one.
        overrides: Settings that differ from it, by dotted names such as ``spread.lam``.
        command: fit, or a baseline: finetune, retrieve.

    Raises:
        FileNotFoundError: If there is no such configuration.
        ValueError: If there is no such setting, or a value is not valid for it.
    """
    settings: dict[str, Any] = yaml.safe_load(Path(locate_config(config)).read_text(encoding="utf-8"))
    for name, value in (overrides or {}).items():
        *path, last = name.split(".")
        section = settings
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    check_settings(command, settings, config)
    cli, lightning_name = _cli_of(command)
    return _build(cli, lightning_name, settings, run=False)


def run_fit(config: str, overrides: Mapping[str, Any] | None = None, command: FitCommand = "fit") -> Path:
    """Run a fit from Python, as the command line does.

    Args:
        config: As for :func:`build_fit`.
        overrides: Settings that differ from it.
        command: fit, or a baseline: finetune, retrieve.

    Returns:
        The run folder.
    """
    cli = build_fit(config, overrides, command)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return Path(cli.trainer.run_dir).expanduser()


def _cli_of(command: str) -> tuple[type[SingleCommandCLI], str]:
    """The CLI of a command, and Lightning's name of the command."""
    baselines: dict[str, type[SingleCommandCLI]] = {"finetune": FineTuningCLI, "retrieve": RetrievalCLI}
    if command in baselines:
        return baselines[command], "fit"
    if command not in EditCLI.COMMANDS:
        raise ValueError(f"unknown command {command!r}, expected one of {', '.join([*EditCLI.COMMANDS, *baselines])}")
    return EditCLI, command


def _build(cli: type[SingleCommandCLI], command: str, args: list[str] | dict[str, Any], run: bool) -> LightningCLI:
    # Configuration names are completed first, so the arguments cannot be left to sys.argv.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    strict = {"allow_abbrev": False, "exit_on_error": False}
    try:
        return cli(
            command,
            cli.MODULE,
            EditDataModule,
            trainer_class=EditTrainer,
            save_config_callback=SaveFitConfig,
            save_config_kwargs={"overwrite": True},  # the trainer has made sure that no other run is there
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "pmet-lightning", **strict, command: strict},
            args=args,
            run=run,
        )
    except ArgumentError as error:
        raise UsageError(" ".join(str(error).split())) from error

"""Lightning's own CLI, for the verbs that need model, data and devices."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from pmet_lightning.baselines.finetuning import FineTuning
from pmet_lightning.data.datamodule import EditDataModule
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.run.settings import add_editing_sections, add_shared_sections
from pmet_lightning.run.trainer import EditTrainer
from pmet_lightning.targets.target_optimizer import TargetOptimizer


class FineTuningCLI(LightningCLI):
    """Lightning's CLI for the baseline, which needs neither second moments nor a spread.

    Args:
        verb: The only one that is meant: to read the signatures that all have takes as long for each of them.
        arguments: Of Lightning's CLI.
    """

    HIDDEN: ClassVar[set[str]] = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
    VERBS: ClassVar[dict[str, set[str]]] = {"fit": HIDDEN}

    def __init__(self, verb: str, *arguments: Any, **named: Any) -> None:
        self._verb = verb
        super().__init__(*arguments, **named)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning asks the instance
        """The verb, and which of the trainer's arguments are no options."""
        return {self._verb: self.VERBS[self._verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As :func:`add_shared_sections`."""
        add_shared_sections(parser)


class EditCLI(FineTuningCLI):
    """The same with the callbacks of editing as sections of their own."""

    VERBS: ClassVar[dict[str, set[str]]] = {
        **dict.fromkeys(("fit", "validate", "test"), FineTuningCLI.HIDDEN),
        "stats": {"model", "datamodule"},
    }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As :func:`add_editing_sections`."""
        add_editing_sections(parser)


class SaveFitConfig(SaveConfigCallback):
    """Stores ``config.yaml`` in the run folder of a fit; other verbs leave no folder."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Save only what belongs to a run."""
        if stage == "fit" and trainer.max_epochs != 0:
            super().setup(trainer, pl_module, stage)


def build(arguments: Sequence[str], run: bool) -> LightningCLI:
    """Build the CLI of a verb, whose configurations are paths, and run the verb if ``run`` is true.

    Args:
        arguments: Of the command line; if nothing is run, the verb may be left out, and fit is meant.
        run: Whether the verb is run.
    """
    # Configuration names are completed first, so the arguments cannot be left to sys.argv.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    arguments = list(arguments)
    if not run and arguments[:1] not in (["fit"], ["finetune"]):
        arguments.insert(0, "fit")
    kind: type[FineTuningCLI] = EditCLI
    module: type[EditableModel] = TargetOptimizer
    if arguments[:1] == ["finetune"]:
        kind, module = FineTuningCLI, FineTuning
        arguments[0] = "fit"
    verb = "".join(arguments[:1])
    if verb not in kind.VERBS:
        raise ValueError(f"unknown verb {verb!r}, expected one of {', '.join([*kind.VERBS, 'finetune'])}")
    return kind(
        verb,
        module,
        EditDataModule,
        trainer_class=EditTrainer,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},  # the trainer has made sure that no other run is there
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"allow_abbrev": False, verb: {"allow_abbrev": False}},
        args=arguments if run else arguments[1:],
        run=run,
    )

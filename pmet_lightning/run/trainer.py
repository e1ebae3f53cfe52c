"""Lightning's Trainer with the defaults of an edit run, and the command ``stats``."""

from __future__ import annotations

import logging
import shlex
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pmet_lightning.model.fsdp import prepare_strategy
from pmet_lightning.model.quantized_base import quiet_casts
from pmet_lightning.run.batch_scores import BatchScores
from pmet_lightning.run.ending import ends_with
from pmet_lightning.run.ledger import EditLedger
from pmet_lightning.run.recorder import RunRecorder
from pmet_lightning.run.tensorboard import TensorBoardCallback
from pmet_lightning.run.timing import PhaseProfiler
from pmet_lightning.run.trainer_arguments import check_arguments
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.distributed import leave_process_group_at_exit
from pmet_lightning.utils.files import NO_ROOM, name_in_errors
from pmet_lightning.utils.progress import EditProgressBar

log = logging.getLogger(__name__)

# Lightning warns about what is intended here: the language model stays in eval mode, batches are text, edits are read
# once and by this process, their number of batches is known, the CSV logger shares the run folder, outputs are not
# changed in place, a fit that only collects second moments has no edits.
_EXPECTED_WARNINGS = (
    r".*module\(s\) in eval mode.*",
    r".*transfer_batch_to_device.*",
    r".*does not have many workers.*",
    r".*directory .* exists and is not empty.*",
    r".*is smaller than the logging interval.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*`IterableDataset` has `__len__` defined.*",
    r"You defined a `validation_step` but have no `val_dataloader`.*",
    r"Total length of `(list|CombinedLoader)` across ranks is zero.*",
    r".*FSDP2-wrapped module .* returned a view tensor.*",
    r"MatMul8bitLt: inputs will be cast.*",  # bitsandbytes before 0.50; later ones log it
)

_FLUSH_SECONDS = 5  # at most, until TensorBoard can read what was logged

# The patch is the result; one epoch is one pass over the edits; all edits are evaluated before the first is written.
EDIT_RUN: dict[str, Any] = {
    "max_epochs": 1,
    "num_sanity_val_steps": -1,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


class EditTrainer(L.Trainer):
    """A Trainer whose fit is one pass over the edits, evaluated before and after.

    Args:
        run_dir: Folder of everything that the run writes; must not hold another run. Null takes the next free
            runs/run_N.
        resume: Whether a run that is in the folder is resumed after its last edit batch; without one, a run begins.
        kwargs: Everything that Lightning's Trainer takes.

    Raises:
        ValueError: If the strategy is one that this program cannot use, the accelerator is not there, or an argument
            makes no sense here (:mod:`~pmet_lightning.run.trainer_arguments`).
    """

    def __init__(self, run_dir: str | None = None, resume: bool = False, **kwargs: Any) -> None:
        check_arguments(kwargs)
        folder = _free_folder(Path("runs")) if run_dir is None else Path(run_dir).expanduser()
        for name, value in {**EDIT_RUN, "default_root_dir": str(folder)}.items():
            kwargs[name] = value if kwargs.get(name) is None else kwargs[name]
        kwargs["use_distributed_sampler"] = False  # the data module distributes the edits itself
        if kwargs.get("logger") in (None, True):
            kwargs["logger"] = [
                TensorBoardLogger(str(folder), name="", version="", default_hp_metric=False, flush_secs=_FLUSH_SECONDS),
                CSVLogger(str(folder), name="", version=_free_version(folder) if resume else ""),
            ]
        self.run_dir, self.recorder = folder, RunRecorder(folder, resume)
        if kwargs.get("profiler") is None:
            kwargs["profiler"] = PhaseProfiler()
        # In this order: each callback passes its results on to those after it.
        given = _as_list(kwargs.get("callbacks"))
        ledger = [] if any(isinstance(callback, EditLedger) for callback in given) else [EditLedger()]
        bars = [] if kwargs.get("enable_progress_bar") is False else [EditProgressBar()]
        own = [*ledger, BatchScores(), *bars, self.recorder, TensorBoardCallback(self.recorder)]
        kwargs["callbacks"] = [*given, *own]
        try:
            super().__init__(**kwargs)
        except MisconfigurationException as error:  # such as a GPU that is not there
            raise ValueError(_not_there(kwargs, error)) from error
        prepare_strategy(self.strategy, self.num_devices * self.num_nodes)
        if self.world_size > 1:
            leave_process_group_at_exit()

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Edit: optimize targets, write the weights after each edit batch, evaluate before and after."""
        self.recorder.check_free()
        if isinstance(self.profiler, PhaseProfiler):
            self.profiler.restart()
        log.info("running on %s", self._where())
        with (
            ends_with(self._last_line),
            self.recorder.no_folder_of_a_failed_start(),
            name_in_errors(self.run_dir, only=NO_ROOM),  # the loggers' errors have no name
            ignore_expected_warnings(),
        ):
            super().fit(*args, **kwargs)
        self.recorder.check_damage(self)

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the questions of the edits and show the scores."""
        with ends_with(_nothing_changed), ignore_expected_warnings():
            return super().validate(*args, **kwargs | {"verbose": False})  # the recorder shows a more readable table

    def test(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the questions of the edits and show the scores; the same as validate."""
        with ends_with(_nothing_changed), ignore_expected_warnings():
            return super().test(*args, **kwargs | {"verbose": False})  # the recorder shows a more readable table

    def stats(self, model: L.LightningModule, datamodule: L.LightningDataModule | None = None) -> None:
        """Collect and store the second moments of the edited layers; a later fit finds them.

        Args:
            model: The module, whose layers decide what is collected.
            datamodule: Not used; the moments do not depend on the edits.
        """
        # A fit without epochs: Lightning sets up devices and model, and the callback of the moments does its
        # work before the first batch.
        self.fit_loop.max_epochs = 0
        self.num_sanity_val_steps = 0
        self.recorder.records = False
        with ends_with(_collection_continues), ignore_expected_warnings():
            super().fit(model, train_dataloaders=[])

    def _where(self) -> str:
        """The devices in words."""
        kind, count = self.strategy.root_device.type, self.num_devices * self.num_nodes
        return f"{kind}, {count} {'process' if count == 1 else 'processes'}"

    def _last_line(self) -> str:
        """What is kept of an interrupted fit, and how to go on."""
        folder, written = self.run_dir, self.recorder.written
        kept = f"the {written} edits written so far are in its patch" if written else "no edit was written yet"
        line = f"interrupted: nothing that was finished is lost, {kept}"
        if not isinstance(self.lightning_module, TargetOptimizer) or not (folder / "config.yaml").is_file():
            return line
        command = f"pmet-lightning fit --config {shlex.quote(str(folder / 'config.yaml'))}"
        return f"{line}; go on with\n{command} --trainer.resume true --trainer.run_dir {shlex.quote(str(folder))}"


def device_options(device: torch.device) -> dict[str, Any]:
    """Arguments of a trainer that works in this process only, on the device of a model that is loaded already.

    Args:
        device: Where the model is.
    """
    kinds = {"cpu": ("cpu", 1), "cuda": ("gpu", [device.index or 0])}
    accelerator, devices = kinds.get(device.type, (device.type, 1))
    return {
        "accelerator": accelerator,
        "devices": devices,
        "plugins": [LightningEnvironment()],  # regardless of what launched this program
        # Tensors that the model caches in a pass, such as a table of positions, must not be inference tensors.
        "inference_mode": False,
    }


def _not_there(given: Mapping[str, Any], error: Exception) -> str:
    """One line on devices that Lightning does not find."""
    names = [name for name in ("accelerator", "devices", "strategy") if given.get(name) not in (None, "auto", 1, "1")]
    shown = " ".join(f"--trainer.{name} {given[name]}" for name in names) or "--trainer"
    return f"{shown}: {' '.join(str(error).split())}; --trainer.accelerator auto takes what this machine has"


def _nothing_changed() -> str:
    return "interrupted: nothing was changed; the same command begins again"


def _collection_continues() -> str:
    return "interrupted: nothing is lost; the same command goes on from the moments that were saved last"


def _as_list(callbacks: Any) -> list[Callback]:
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]


def _free_version(folder: Path) -> str:
    """A folder of its own for the metrics of a resumed run: the logger starts a new file."""
    if not (folder / "metrics.csv").exists():
        return ""
    return f"resumed-{1 + len(list(folder.glob('resumed-*')))}"


def _free_folder(parent: Path) -> Path:
    number = 0
    while (parent / f"run_{number}").exists():
        number += 1
    return parent / f"run_{number}"


@contextmanager
def ignore_expected_warnings() -> Iterator[None]:
    """Suppress the warnings about what is intended."""
    with warnings.catch_warnings(), quiet_casts():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield

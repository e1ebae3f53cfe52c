"""A callback that logs a run in detail, to TensorBoard and to every other logger.

The meaning of the tags is listed in docs/tensorboard.md.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from pmet_lightning.data.datamodule import EditBatch
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.evaluation.scores import METRICS, table_of
from pmet_lightning.report.logged_metrics import (
    answers_table,
    batch_points,
    histograms,
    is_shown,
    layer_points,
    layout,
    scores_table,
    shown_edits,
    step_points,
    write_points,
)
from pmet_lightning.run.hparams import collect_hparams, hparams_summaries
from pmet_lightning.run.recorder import RunRecorder
from pmet_lightning.run.timing import PhaseProfiler
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.callbacks import all_edits
from pmet_lightning.utils.distributed import ProcessGroup
from pmet_lightning.utils.metric_names import BEFORE, DETAILS, EDIT_BATCHES, FIGURES, SCORE_TABLE, SCORES, TEXTS
from pmet_lightning.write.write_report import BatchOutputs

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


log = logging.getLogger(__name__)

_MAIN = {*METRICS, "perplexity", "kl"}  # logged in the first group
_PHASES = ("before", "targets", "spread", "ledger", "after")  # phases that the time of an edit batch consists of


class TensorBoardCallback(L.Callback):
    """Logs the results of edit batches; added by :class:`~pmet_lightning.run.trainer.EditTrainer` after the recorder.

    The device is not read while targets are found: curves by step come from the targets' histories, at the end of the
    edit batch. Numbers go to every logger; histograms, texts, figures and hyper-parameters to TensorBoard's. Of many
    edit batches, fewer and fewer have curves and texts (:func:`~pmet_lightning.report.logged_metrics.is_shown`).

    Args:
        recorder: The callback that writes the run folder; its figures are logged.
    """

    def __init__(self, recorder: RunRecorder) -> None:
        self.recorder = recorder
        self._seconds: dict[str, float] = {}  # of each phase, until the last edit batch
        self._answers_before: list[str] = []  # to the first edits of the edit batch
        self._shown: set[str] = set()  # phases whose scores have been logged
        self._started = False
        self._warned = False  # about a number that is not finite

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the scores before the first and after the last edit."""
        assert isinstance(pl_module, EditableModel)
        if trainer.state.fn == TrainerFn.FITTING:
            self._log_scores(trainer, pl_module, pl_module.phase)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the hyper-parameters, and the layout of TensorBoard's charts."""
        assert isinstance(pl_module, EditableModel)
        self._seconds = _seconds(trainer)
        if not trainer.loggers:
            return
        self._started = True
        settings = collect_hparams(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)
        for writer in _writers(trainer):
            for summary in hparams_summaries(settings, _final_tags())[:2]:
                writer._get_file_writer().add_summary(summary)
            writer.add_custom_scalars(layout())
        _save(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: EditBatch, batch_idx: int
    ) -> None:
        """Have the model answer the first edits' questions before the edit batch is written."""
        self._answers_before = []
        if not (isinstance(pl_module, TargetOptimizer) and batch.edits and _has_board(trainer)):
            return
        if is_shown(batch_idx + pl_module.batches_done):
            with trainer.profiler.profile("before"):
                self._answers_before = _answers(trainer, pl_module, batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Log the results of the edit batch, so that they can be read while the run continues."""
        seconds, self._seconds = self._seconds, _seconds(trainer)
        with trainer.profiler.profile("report"):
            if outputs is not None and "written" in outputs and trainer.is_global_zero and trainer.loggers:
                assert isinstance(pl_module, TargetOptimizer)
                self._log_batch(trainer, pl_module, outputs, seconds)
            _save(trainer)  # of a baseline, its epochs
        self._seconds = _seconds(trainer)

    def _log_batch(
        self, trainer: L.Trainer, pl_module: TargetOptimizer, outputs: BatchOutputs, seconds: Mapping[str, float]
    ) -> None:
        """Numbers, histograms and texts of an edit batch; ``seconds`` are those of each phase before it."""
        report, rules = outputs["written"], pl_module.rules
        number = report.edit_batch
        points = batch_points(report, rules.clamp) | _rates(len(report.edits), seconds, self._seconds)
        scores = table_of(outputs["rows_at_once"]) if "rows_at_once" in outputs else {}
        points |= {f"{EDIT_BATCHES}/at_once_{name}": float(scores[name]) for name in METRICS if name in scores}
        for layer in report.layers:
            points |= layer_points(layer)
        self._log(trainer, points, number)
        for step, values in write_points(report):
            self._log(trainer, values, step)
        if is_shown(number):
            for step, values in enumerate(step_points(report.targets, rules), start=number * rules.steps):
                self._log(trainer, values, step)
            for writer in _writers(trainer):
                self._show(writer, outputs)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what is known only at the end: scores of a stream, figures of the report, that the run succeeded."""
        assert isinstance(pl_module, EditableModel)
        if not self.recorder.records or not trainer.is_global_zero:
            return
        for phase in [phase for phase in pl_module.results if phase not in self._shown]:
            self._log_scores(trainer, pl_module, phase)
        for writer in _writers(trainer):
            for name, figure in self.recorder.drawn.items():
                writer.add_figure(f"{FIGURES}/{name}", figure, self._edits(trainer))
            writer.add_text(SCORE_TABLE, scores_table(pl_module.results), self._edits(trainer))
            if self._started:
                writer._get_file_writer().add_summary(hparams_summaries({}, [])[2])

    def _show(self, writer: SummaryWriter, outputs: BatchOutputs) -> None:
        """Histograms and texts of an edit batch."""
        report = outputs["written"]
        for name, values in histograms(report).items():
            writer.add_histogram(name, values, report.edit_batch)
        shown = shown_edits(len(report.edits))
        questions = [report.edits[i].question for i in shown]
        table = answers_table(questions, self._answers_before, outputs["ledger"][: len(shown)])
        writer.add_text(TEXTS, table, report.edit_batch)

    def _log_scores(self, trainer: L.Trainer, module: EditableModel, phase: str) -> None:
        """Log scores of all records, with the number of edits that have been written as the step.

        Those of the unedited model have charts of their own: TensorBoard smooths curves unless told otherwise, and of
        two points, 0 and 98, it would show the second one at 61.
        """
        values = module.results.get(phase, {})
        self._shown.add(phase)
        if phase == "before":
            self._log(trainer, {f"{BEFORE}/{name}": value for name, value in values.items()}, 0)
            return
        points = {f"{SCORES if name in _MAIN else DETAILS}/{name}": value for name, value in values.items()}
        self._log(trainer, points, self._edits(trainer))

    def _log(self, trainer: L.Trainer, points: Mapping[str, float], step: int) -> None:
        finite = {name: value for name, value in points.items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(finite, step)
        if len(finite) < len(points) and not self._warned and trainer.is_global_zero:
            self._warned = True
            not_finite = ", ".join(f"{name} ({value})" for name, value in points.items() if name not in finite)
            log.warning(
                "not finite, and so left out of TensorBoard and metrics.csv: %s at step %d (reported once)",
                not_finite,
                step,
            )

    def _edits(self, trainer: L.Trainer) -> int:
        """How many edits are in the weights; a baseline writes all at once."""
        return self.recorder.written or len(all_edits(trainer))


def _final_tags() -> list[str]:
    """Tags that runs are compared by, the Score first."""
    return [f"{SCORES}/{name}" for name in reversed(METRICS)]


def _seconds(trainer: L.Trainer) -> dict[str, float]:
    """Seconds of each phase so far; empty if the user has given another profiler."""
    return dict(trainer.profiler.seconds) if isinstance(trainer.profiler, PhaseProfiler) else {}


def _answers(trainer: L.Trainer, module: TargetOptimizer, batch: EditBatch) -> list[str]:
    """The model's current answers to the questions of the first edits of an edit batch."""
    processes, shown = ProcessGroup.of(trainer), shown_edits(len(batch.edits))
    texts = module.greedy_answers([batch.edits[i].question for i in processes.shard(shown)])
    return processes.all_gather_objects(texts, len(shown))


def _rates(edits: int, before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Edits per second: in finding targets, in writing, and in all phases of an edit batch.

    Args:
        edits: Number of edits.
        before: Seconds of each phase before the edit batch.
        now: Seconds of each phase after it.
    """
    if not now:
        return {}
    taken = {phase: now.get(phase, 0.0) - before.get(phase, 0.0) for phase in _PHASES}
    rates = {"": sum(taken.values()), "_targets": taken["targets"], "_spread": taken["spread"]}
    return {
        f"{EDIT_BATCHES}/edits_per_second{name}": edits / max(seconds, time.get_clock_info("perf_counter").resolution)
        for name, seconds in rates.items()
    }


def _save(trainer: L.Trainer) -> None:
    """Have the loggers write what they buffer: Lightning does so every so many training steps, not edit batches."""
    for logger in trainer.loggers:
        logger.save()


def _has_board(trainer: L.Trainer) -> bool:
    return any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)


def _writers(trainer: L.Trainer) -> Iterator[SummaryWriter]:
    """TensorBoard's writers; none except on the first process."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                yield logger.experiment

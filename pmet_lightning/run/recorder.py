"""A callback that writes the run folder: contexts, journal, patch, scores, report, and the state of the run."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from pmet_lightning.data.datamodule import EditBatch
from pmet_lightning.evaluation.answers import edit_answer
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.evaluation.scores import table_of
from pmet_lightning.evaluation.verdict import verdict_lines
from pmet_lightning.moments.second_moments import SecondMoments
from pmet_lightning.report.tables import forgetting_lines, other_lines, score_table
from pmet_lightning.run.final_report import report_data, write_final_report
from pmet_lightning.run.journal import VALIDATED, Journal
from pmet_lightning.run.manifest import manifest_of, moments_of
from pmet_lightning.run.outcome import RunOutcome, answers_before_and_after, needed_lines, outcome_of
from pmet_lightning.run.patch_file import PATCH, save_edits
from pmet_lightning.run.resume import reapply_patch, restore_progress
from pmet_lightning.run.state import RunState
from pmet_lightning.run.summary import Summary, plain_rows, summary_of
from pmet_lightning.targets.store import overall_curves
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.callbacks import find_callback, is_stream
from pmet_lightning.utils.files import write_json
from pmet_lightning.write.drift import Drift
from pmet_lightning.write.weight_spread import WeightSpread
from pmet_lightning.write.write_report import BatchOutputs, WriteReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


class RunRecorder(L.Callback):
    """Writes the run folder; added by :class:`~pmet_lightning.run.trainer.EditTrainer` after all callbacks.

    After each edit batch the journal is written, then the patch is replaced as one file. The manifest inside it says
    how many edit batches it holds, whatever ends the run.

    Args:
        folder: The run folder.
        resume: Whether a run that is there is resumed.

    Attributes:
        written: Number of edits in the patch.
        drawn: The figures of the report, once they are drawn at the end.
        outcome: How the run ended, once it has.
    """

    def __init__(self, folder: str | Path, resume: bool = False) -> None:
        self.folder, self.resume = Path(folder).expanduser(), resume
        self.state, self.journal, self.patch = RunState(self.folder), Journal(self.folder), self.folder / PATCH
        self.records = True
        self.written = 0
        self.drawn: dict[str, Figure] = {}
        self.outcome: RunOutcome | None = None
        self._started = 0.0
        self._moments: dict[str, Any] | None = None  # what they depend on

    def check_free(self) -> None:
        """Refuse a folder that holds another run, unless that run is resumed.

        Raises:
            FileExistsError: If it holds one.
        """
        if not self.resume:
            self.state.check_free()

    @contextmanager
    def no_folder_of_a_failed_start(self) -> Iterator[None]:
        """Remove the folder again if the run fails before it has begun, and there was none before."""
        existed = self.folder.exists()
        try:
            yield
        except BaseException:
            if not (existed or self.state.begun):
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that the run has started, or is resumed."""
        self._started = time.perf_counter()
        if not self.records:
            return
        moments = find_callback(trainer, SecondMoments)
        if moments is not None and isinstance(pl_module, TargetOptimizer):
            self._moments = moments_of(pl_module, moments)  # once: the corpus may be gone later
        batches = 0
        if self.resume:
            batches, self.written = restore_progress(trainer, pl_module, self.patch, self.journal, self._moments)
        if batches:
            log.info("resuming after %d edits in %d edit batches", self.written, batches)
        self._save_state(trainer, status="running", edit_batches_written=batches, edits_written=self.written)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store the contexts; write again what was written before the run was resumed."""
        if not isinstance(pl_module, TargetOptimizer):
            return
        if self.written:
            reapply_patch(trainer, pl_module, self.patch)
        if self._writes(trainer):
            write_json(self.folder / "contexts.json", pl_module.contexts)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """After an edit batch is written: journal, patch, state, in this order."""
        if outputs is None or "written" not in outputs:
            return
        assert isinstance(pl_module, TargetOptimizer)
        spread = find_callback(trainer, WeightSpread)
        assert spread is not None
        report: WriteReport = outputs["written"]
        batches = report.edit_batch + 1
        self.written += len(report.edits)
        if self._writes(trainer):
            self.journal.add(outputs["ledger"], _journal_entry(outputs), outputs.get("answers", ()))
            edits = pl_module.edits_done + self.written
            manifest = manifest_of(pl_module, spread, self._moments, batches, edits)
            save_edits(self.patch, spread.edited, manifest, spread.stores_keys)
        self._save_state(trainer, edit_batches_written=batches, edits_written=self.written)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store and show the scores, the verdict and the report."""
        assert isinstance(pl_module, EditableModel)
        if not self.records:
            return
        lines = needed_lines(self.journal.edits()) if trainer.is_global_zero else []
        self.outcome = outcome_of(trainer, pl_module, lines)  # with all processes
        if trainer.is_global_zero:
            self._finish(trainer, pl_module, self.outcome)

    def _finish(self, trainer: L.Trainer, pl_module: EditableModel, outcome: RunOutcome) -> None:
        """What the first process stores and shows at the end."""
        stream = is_stream(trainer)
        found = summary_of(self.journal.batches(), None if stream else pl_module.record_rows.get("after"))
        if stream:
            _take_scores(pl_module, found)
        batches = {"edit_batches": found.batches} if found.batches else {}
        write_json(self.folder / "scores.json", pl_module.results | batches)
        if not stream:
            self.journal.write_answers(answers_before_and_after(pl_module))
        data = report_data(trainer, pl_module, self.journal, found, self.folder, self.written, outcome)
        self.drawn = write_final_report(trainer, data, self.folder, time.perf_counter() - self._started)
        drift = find_callback(trainer, Drift)
        ended = {"ended": drift.ended, "advice": drift.advice} if drift is not None and drift.ended else {}
        verdict = outcome.verdict
        status = "damaged" if verdict.damage.level == "damaged" else "finished"
        self._save_state(trainer, status=status, verdict=verdict.plain(), **ended)
        shown = [score_table(pl_module.results), *other_lines(pl_module.results), *forgetting_lines(found.batches)]
        log.info("%s", "\n".join(shown))
        level = logging.INFO if verdict.damage.level in ("none", "not measured") else logging.WARNING
        log.log(level, "%s\nrun folder: %s", "\n".join(verdict_lines(verdict)), self.folder)

    def check_damage(self, trainer: L.Trainer) -> None:
        """Refuse a run that has damaged the model, if that is wanted; everything is stored by then.

        Raises:
            DamagedModelError: If it has.
        """
        drift = find_callback(trainer, Drift)
        if self.outcome is not None and drift is not None:
            drift.check(self.outcome.verdict.damage)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store and show the scores of an evaluation that is not part of a fit, beside what a run has left there."""
        assert isinstance(pl_module, EditableModel)
        if trainer.state.fn == TrainerFn.FITTING or not trainer.is_global_zero:
            return
        path = self.folder / "scores.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_json(path, earlier | pl_module.results)
        answers = pl_module.answers.get("validate", {})
        self.journal.write_answers(answers.values(), VALIDATED)
        said = [found[1] for line in answers.values() if (found := edit_answer(line))]
        verdict = [f"the model says {sum(said)} of {len(said)} new facts by itself"] if said else []
        shown = [score_table(pl_module.results), *other_lines(pl_module.results), *verdict]
        log.info("%s\nscores and answers: %s", "\n".join(shown), self.folder)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As :meth:`on_validation_end`."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Record how the run ended; the patch holds whole edit batches only."""
        if self.state.begun:
            status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
            self._save_state(trainer, status=status, error=f"{type(exception).__name__}: {exception}")

    def _writes(self, trainer: L.Trainer) -> bool:
        """Whether this process writes the run folder."""
        return self.records and trainer.is_global_zero

    def _save_state(self, trainer: L.Trainer, **changes: Any) -> None:
        self.state.update(trainer.is_global_zero, **changes)


def _journal_entry(outputs: BatchOutputs) -> dict[str, Any]:
    """What the journal keeps of an edit batch besides its ledger."""
    report = outputs["written"]
    entry = {
        "edit_batch": report.edit_batch,
        "layers": report.layer_lines(),
        "curves": overall_curves(report.targets),
    }
    if "rows_at_once" in outputs:
        entry["before"] = plain_rows(outputs.get("rows_before"))
        entry["at_once"] = plain_rows(outputs["rows_at_once"])
    return entry


def _take_scores(module: EditableModel, found: Summary) -> None:
    """The scores of a stream: of each edit right before and right after its edit batch was written."""
    for phase, rows in found.rows.items():
        module.record_rows[phase] = rows
        module.results[phase] = {name: float(value) for name, value in table_of(rows).items()}

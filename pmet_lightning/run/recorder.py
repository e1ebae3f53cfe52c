"""What a run leaves: state.json, contexts.json, ledger.jsonl, patch.safetensors, scores.json, a table."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from pmet_lightning.data.datamodule import EditBatch
from pmet_lightning.data.records import Edit
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.evaluation.scores import record_rows, table_of
from pmet_lightning.model.patch import apply_patch, load_patch, save_patch
from pmet_lightning.moments.second_moments import SecondMoments
from pmet_lightning.report.run_data import columns_of, edit_lines, layer_line, relation_lines, saved_settings
from pmet_lightning.report.run_report import figures, write_report
from pmet_lightning.report.tables import forgetting_lines, other_lines, score_table
from pmet_lightning.run.journal import Journal
from pmet_lightning.run.ledger import ledger_lines
from pmet_lightning.run.manifest import check_same_settings, manifest_of, moments_of
from pmet_lightning.run.summary import Summary, plain_rows, summary_of
from pmet_lightning.run.timing import PhaseClock
from pmet_lightning.targets.store import mean_curves
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.callbacks import all_edits, find_callback
from pmet_lightning.utils.distributed import Team
from pmet_lightning.utils.files import write_json
from pmet_lightning.utils.versions import versions
from pmet_lightning.write.drift import Drift
from pmet_lightning.write.past_keys import load_products, save_products
from pmet_lightning.write.weight_spread import WeightSpread
from pmet_lightning.write.write_report import SpreadReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


log = logging.getLogger(__name__)

STATE = "state.json"
_MOST_REPORTED = 20_000  # edits of a stream


@dataclass(frozen=True)
class WrittenBatch:
    """What is known of an edit batch that was written down.

    Attributes:
        report: What the spread left.
        ledger: Lines of its edits.
        scores: Of its edits right after it; empty where it was the only one.
    """

    report: SpreadReport
    ledger: list[str]
    scores: dict[str, float]


class RunRecorder(L.Callback):
    """Writes the run folder; added by :class:`~pmet_lightning.run.trainer.EditTrainer` behind all callbacks.

    After each edit batch the journal is written, then the patch is replaced as one file. The manifest inside it says
    how many edit batches it holds, whatever ends the run.

    Args:
        folder: The run folder.
        resume: Whether a run that is there goes on.

    Attributes:
        written: Edits in the patch.
        last: The last edit batch; ``None`` if nothing was left of it.
        drawn: The figures of the report, at the end.
    """

    def __init__(self, folder: str | Path, resume: bool = False) -> None:
        self.folder, self.resume = Path(folder), resume
        self.journal = Journal(self.folder)
        self.records = True
        self.clock = PhaseClock()  # a callback too, in front of all others
        self._started = 0.0
        self._state: dict[str, Any] = {}
        self.written = 0
        self._rows_before: Tensor | None = None  # of the edits that a stream has brought last
        self._moments: dict[str, Any] | None = None  # what they came from
        self.last: WrittenBatch | None = None
        self.drawn: dict[str, Figure] = {}

    def check_free(self) -> None:
        """Refuse a folder that another run is in.

        Raises:
            FileExistsError: If there is one.
        """
        if (self.folder / STATE).exists() and not self.resume:
            raise FileExistsError(
                f"the output folder {str(self.folder)!r} holds another run ({STATE}); expected a new one: set "
                "--trainer.run_dir to another folder, or leave it out to have one made; --trainer.resume true goes on "
                "with the run that is there"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that the work begins, or goes on."""
        self.clock.end("moments")
        self._started = time.perf_counter()
        if not self.records:
            return
        moments = find_callback(trainer, SecondMoments)
        if moments is not None and isinstance(pl_module, TargetOptimizer):
            self._moments = moments_of(pl_module, moments)  # once: the corpus may be gone later
        batches = self._find_again(trainer, pl_module) if self.resume else 0
        self._save_state(trainer, status="running", edit_batches_written=batches, edits_written=self.written)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The unedited model is judged."""
        self.clock.end("before")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store the contexts; write again what a resumed run had written."""
        if self.written:
            assert isinstance(pl_module, TargetOptimizer)
            self._write_again(trainer, pl_module)
        if self._writes(trainer) and isinstance(pl_module, TargetOptimizer):
            write_json(self.folder / "contexts.json", pl_module.contexts)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: EditBatch, batch_idx: int
    ) -> None:
        """Judge the model on what a stream has brought, before it is written."""
        if _is_stream(trainer) and batch.edits:
            assert isinstance(pl_module, EditableModel)
            self.clock.end("records")
            self._rows_before = _judged(trainer, pl_module, batch.edits, self.written)
            self.clock.end("before")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """After an edit batch is written: journal, patch, state, in this order."""
        self.clock.end("spread")
        self.last = None
        spread = find_callback(trainer, WeightSpread)
        if spread is None or spread.report is None:
            return
        assert isinstance(pl_module, TargetOptimizer)
        report = spread.report
        entry: dict[str, Any] = {
            "edit_batch": report.edit_batch,
            "layers": [layer_line(report.edit_batch, layer) for layer in report.layers],
            "curves": mean_curves(report.targets),
        }
        lines, scores = ledger_lines(pl_module, report), {}
        self.clock.end("ledger")
        # With a single edit batch the end says it all.
        if _is_stream(trainer) or len(all_edits(trainer)) > len(report.edits):
            rows = _judged(trainer, pl_module, report.edits, self.written)
            scores = {name: float(value) for name, value in table_of(rows).items()}
            entry |= {"before": plain_rows(self._rows_before), "at_once": plain_rows(rows)}
        self.clock.end("after")
        self.written += len(report.edits)
        self.last = WrittenBatch(report, lines, scores)
        if self._writes(trainer):
            self.journal.add(lines, entry)
            self._save_patch(pl_module, spread, report.edit_batch + 1)
        self._save_state(trainer, edit_batches_written=report.edit_batch + 1, edits_written=self.written)
        self.clock.end("ledger")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store and show the scores, and the report."""
        assert isinstance(pl_module, EditableModel)
        if not self._writes(trainer):
            return
        self.clock.end("after")
        stream = _is_stream(trainer)
        found = summary_of(self.journal.batches(), None if stream else pl_module.record_rows.get("after"))
        if stream:
            self._take_scores(pl_module, found)
        batches = {"edit_batches": found.batches} if found.batches else {}
        write_json(self.folder / "scores.json", pl_module.results | batches)
        self._report(trainer, pl_module, found)
        drift = find_callback(trainer, Drift)
        ended = {"ended": drift.ended, "advice": drift.advice} if drift is not None and drift.ended else {}
        self._save_state(trainer, status="finished", **ended)
        shown = [score_table(pl_module.results), *other_lines(pl_module.results), *forgetting_lines(found.batches)]
        log.info("%s\nrun folder: %s", "\n".join(shown), self.folder)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the scores of an evaluation that is not part of a fit."""
        assert isinstance(pl_module, EditableModel)
        if trainer.state.fn != TrainerFn.FITTING and trainer.is_global_zero:
            log.info("%s", "\n".join([score_table(pl_module.results), *other_lines(pl_module.results)]))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As :meth:`on_validation_end`."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say how the run ended, and that the patch holds whole edit batches only."""
        if self._state:
            status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
            self._save_state(trainer, status=status, error=f"{type(exception).__name__}: {exception}")

    @property
    def _patch_path(self) -> Path:
        return self.folder / "patch.safetensors"

    def _past_path(self, edit_batches: int) -> Path:
        """Where the keys of so many edit batches are kept."""
        return self.folder / f"past-{edit_batches}.safetensors"

    def _save_patch(self, module: TargetOptimizer, spread: WeightSpread, edit_batches: int) -> None:
        """Replace the patch; the protected keys that belong to the old one go after it, those of the new come before.

        Wherever a kill comes, the keys that the patch's manifest asks for are there.
        """
        if spread.protect_past:
            save_products(self._past_path(edit_batches), spread.past)
        save_patch(self._patch_path, spread.deltas, manifest_of(module, spread, self._moments, self.written))
        for path in self.folder.glob("past-*.safetensors"):
            if path != self._past_path(edit_batches):
                path.unlink()

    def _find_again(self, trainer: L.Trainer, module: L.LightningModule) -> int:
        """Take up what the run in the folder has done; returns its edit batches.

        Raises:
            FileNotFoundError: If something that it has written is missing.
            ValueError: If it was another run.
        """
        team, batches = Team.of(trainer), 0
        if self._patch_path.is_file():
            assert isinstance(module, TargetOptimizer)
            batches = self._check_same(trainer, module)
        self.written = team.object_from_first(lambda: self.journal.keep(batches))
        if batches:
            log.info("going on behind %d edits in %d edit batches", self.written, batches)
        return batches

    def _check_same(self, trainer: L.Trainer, module: TargetOptimizer) -> int:
        """Have the module, the spread and the data go on behind the patch; returns its edit batches."""
        spread = find_callback(trainer, WeightSpread)
        assert spread is not None
        deltas, manifest = load_patch(self._patch_path)
        batches = int(manifest["edit_batches"])
        module.contexts = module.given_contexts or manifest["contexts"]
        check_same_settings(manifest, manifest_of(module, spread, self._moments, self.written), self.folder)
        past = self._past_path(batches)
        if spread.protect_past and not past.is_file():
            raise FileNotFoundError(
                f"no {str(past)!r}, the protected keys of the {batches} edit batches in {self._patch_path.name}; "
                "expected them beside it: put the file back, or begin a new run in another --trainer.run_dir"
            )
        written = itertools.islice(self.journal.ledger(), manifest["edits"])
        trainer.datamodule.go_on_behind(map(json.loads, written))  # type: ignore[attr-defined]
        spread.deltas = deltas
        module.batches_done = batches - 1  # the first of this epoch is what was written
        return batches

    def _write_again(self, trainer: L.Trainer, module: TargetOptimizer) -> None:
        spread = find_callback(trainer, WeightSpread)
        assert spread is not None
        spread.keep_norms(module)
        manifest = apply_patch(module.model, module.sites, self._patch_path, module.base_fingerprint)
        if spread.protect_past and trainer.is_global_zero:
            spread.past = load_products(self._past_path(manifest["edit_batches"]))

    def _take_scores(self, module: EditableModel, found: Summary) -> None:
        """The scores of a stream: of each edit right before and right after its edit batch was written."""
        for phase, rows in found.rows.items():
            module.record_rows[phase] = rows
            module.results[phase] = {name: float(value) for name, value in table_of(rows).items()}

    def _report(self, trainer: L.Trainer, module: EditableModel, found: Summary) -> None:
        """Write report.html and report.json."""
        # Of a long stream the report shows the latest edits.
        first = max(0, self.written - _MOST_REPORTED) if _is_stream(trainer) else 0
        ledger = itertools.islice(self.journal.ledger(), first, None)
        edits = edit_lines(all_edits(trainer), ledger, module.record_rows, first)
        data = {
            "title": self.folder.name,
            "model": module.model_name,
            "records": getattr(getattr(trainer, "datamodule", None), "path", None),
            "edits_count": len(all_edits(trainer)) or self.written,
            "created": datetime.now().astimezone().isoformat(" ", "seconds"),
            "seconds": round(time.perf_counter() - self._started, 1),
            "scores": module.results,
            "edit_batches": found.batches,
            "curves": columns_of([*module.curves, *found.curves]),
            "layers": found.layers,
            "edits": edits,
            "relations": relation_lines(edits, module.record_rows),
            "settings": saved_settings(self.folder),
            "versions": versions(),
        }
        self.drawn = figures(data)
        self.clock.end("report")
        data["phases"] = {phase: round(seconds, 3) for phase, seconds in self.clock.seconds.items()}
        write_report(data, self.folder, self.drawn)

    def _writes(self, trainer: L.Trainer) -> bool:
        """Whether this process writes the run folder."""
        return self.records and trainer.is_global_zero

    def _save_state(self, trainer: L.Trainer, **changes: Any) -> None:
        self._state |= changes
        if trainer.is_global_zero:
            write_json(self.folder / STATE, self._state)


def _is_stream(trainer: L.Trainer) -> bool:
    return bool(getattr(getattr(trainer, "datamodule", None), "stream", False))


def _judged(trainer: L.Trainer, module: EditableModel, edits: Sequence[Edit], first: int) -> Tensor:
    """Score rows of some edits on the model as it is now; ``first`` is the place of the first among all."""
    team, count = Team.of(trainer), len(edits)
    rows = record_rows(module.evaluate(team.own(edits), team.own(range(first, first + count))))
    return team.gathered(rows.to(module.device), count).cpu()

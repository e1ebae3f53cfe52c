"""What a run leaves: state.json, contexts.json, ledger.jsonl, patch.safetensors, scores.json, a table."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from pmet_lightning.clock import PhaseClock
from pmet_lightning.data import EditBatch
from pmet_lightning.drift import Drift
from pmet_lightning.editable import EditableModel
from pmet_lightning.edits import Edit
from pmet_lightning.files import write_json
from pmet_lightning.journal import Journal
from pmet_lightning.ledger import ledger_lines
from pmet_lightning.manifest import manifest_of
from pmet_lightning.metrics import METRICS
from pmet_lightning.metrics.scores import record_rows, table_of
from pmet_lightning.module import TargetOptimizer
from pmet_lightning.moments import load_products, save_products
from pmet_lightning.parallel import Team
from pmet_lightning.patch import apply_patch, load_patch, save_patch
from pmet_lightning.progress import all_edits, find_callback
from pmet_lightning.report import figures, write_report
from pmet_lightning.report_data import (
    columns_of,
    edit_lines,
    layer_line,
    relation_lines,
    saved_settings,
    versions,
)
from pmet_lightning.score_lines import forgetting_lines, other_lines, score_table
from pmet_lightning.spread import WeightSpread
from pmet_lightning.spread_report import SpreadReport
from pmet_lightning.targets import mean_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

STATE = "state.json"
# What of a manifest must be the same when a run goes on.
_SETTINGS = (
    "fingerprint",
    "layers",
    "sites",
    "optimised",
    "lam",
    "rule",
    "null_space",
    "protect_past",
    "rules",
    "contexts",
)
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
    """Writes the run folder; added by :class:`~pmet_lightning.trainer.EditTrainer` behind all callbacks.

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
        batches = 0
        if self.resume and self._patch_path.is_file():
            assert isinstance(pl_module, TargetOptimizer)
            batches = self._find_again(trainer, pl_module)
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
            entry |= {"before": _plain(self._rows_before), "at_once": _plain(rows)}
        self.clock.end("after")
        self.written += len(report.edits)
        self.last = WrittenBatch(report, lines, scores)
        if self._writes(trainer):
            self.journal.add(lines, entry)
            if spread.protect_past:
                save_products(self._past_path, spread.past)
            save_patch(self._patch_path, spread.deltas, manifest_of(pl_module, spread, self.written))
        self._save_state(trainer, edit_batches_written=report.edit_batch + 1, edits_written=self.written)
        self.clock.end("ledger")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store and show the scores, and the report."""
        assert isinstance(pl_module, EditableModel)
        if not self._writes(trainer):
            return
        self.clock.end("after")
        entries = list(self.journal.batches())
        if _is_stream(trainer):
            self._sum_up(pl_module, entries)
        batches = _forgetting(entries, None if _is_stream(trainer) else pl_module.record_rows.get("after"))
        write_json(self.folder / "scores.json", pl_module.results | ({"edit_batches": batches} if batches else {}))
        self._report(trainer, pl_module, batches, entries)
        drift = find_callback(trainer, Drift)
        ended = {"ended": drift.ended} if drift is not None and drift.ended else {}
        self._save_state(trainer, status="finished", **ended)
        shown = [score_table(pl_module.results), *other_lines(pl_module.results), *forgetting_lines(batches)]
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

    @property
    def _past_path(self) -> Path:
        return self.folder / "past.safetensors"

    def _find_again(self, trainer: L.Trainer, module: TargetOptimizer) -> int:
        """Take up what the run in the folder has done; returns its edit batches.

        Raises:
            ValueError: If it was another run.
        """
        spread = find_callback(trainer, WeightSpread)
        assert spread is not None
        deltas, manifest = load_patch(self._patch_path)
        module.contexts = module.given_contexts or manifest["contexts"]
        mine = json.loads(json.dumps(manifest_of(module, spread, self.written), default=str))
        other = [name for name in _SETTINGS if mine[name] != manifest.get(name)]
        if other:
            differences = "; ".join(f"{name}: {manifest.get(name)} then, {mine[name]} now" for name in other)
            raise ValueError(
                f"--trainer.resume: {self.folder} holds a run with other settings ({differences}); give the same ones, "
                "or another --trainer.run_dir"
            )
        spread.deltas = deltas
        if trainer.is_global_zero:
            self.journal.keep(manifest["edit_batches"])
        self.written = manifest["edits"]
        module.batches_done = manifest["edit_batches"] - 1  # the first of this epoch is what was written
        trainer.datamodule.done = self.written  # type: ignore[attr-defined]
        log.info("going on behind %d edits in %d edit batches", self.written, manifest["edit_batches"])
        return int(manifest["edit_batches"])

    def _write_again(self, trainer: L.Trainer, module: TargetOptimizer) -> None:
        spread = find_callback(trainer, WeightSpread)
        assert spread is not None
        spread.keep_norms(module)
        apply_patch(module.model, module.sites, self._patch_path, module.base_fingerprint)
        if spread.protect_past and trainer.is_global_zero:
            spread.past = load_products(self._past_path, module.device)

    def _sum_up(self, module: EditableModel, entries: Sequence[Mapping[str, Any]]) -> None:
        """The scores of a stream: of each edit right before and right after its edit batch was written."""
        for phase, column in (("before", "before"), ("after", "at_once")):
            rows = [_rows(entry[column]) for entry in entries if entry.get(column)]
            if rows:
                module.record_rows[phase] = torch.cat(rows)
                table = table_of(module.record_rows[phase])
                module.results[phase] = {name: float(value) for name, value in table.items()}

    def _report(
        self,
        trainer: L.Trainer,
        module: EditableModel,
        batches: list[dict[str, Any]],
        entries: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write report.html and report.json."""
        # Of a long stream the report shows the latest edits.
        first = max(0, self.written - _MOST_REPORTED) if _is_stream(trainer) else 0
        ledger = list(itertools.islice(self.journal.ledger(), first, None))
        edits = edit_lines(all_edits(trainer), ledger, module.record_rows, first)
        curves = module.curves + [point for entry in entries for point in entry["curves"]]
        data = {
            "title": self.folder.name,
            "model": module.model_name,
            "records": getattr(getattr(trainer, "datamodule", None), "path", None),
            "edits_count": len(all_edits(trainer)) or self.written,
            "created": datetime.now().astimezone().isoformat(" ", "seconds"),
            "seconds": round(time.perf_counter() - self._started, 1),
            "scores": module.results,
            "edit_batches": batches,
            "curves": columns_of(curves),
            "layers": [line for entry in entries for line in entry["layers"]],
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


def _plain(rows: Tensor | None) -> list[list[float | None]] | None:
    """Rows as JSON has them: no NaN."""
    return None if rows is None else [[None if value != value else value for value in row] for row in rows.tolist()]


def _rows(plain: Sequence[Sequence[float | None]]) -> Tensor:
    return torch.tensor([[math.nan if v is None else v for v in row] for row in plain], dtype=torch.float64)


def _forgetting(entries: Sequence[Mapping[str, Any]], final: Tensor | None) -> list[dict[str, Any]]:
    """For each edit batch its scores right after it and after all of them, and the difference.

    Args:
        entries: The journal's.
        final: Rows of all records after the last edit batch; ``None`` for a stream, whose end is not judged.
    """
    batches: list[dict[str, Any]] = []
    start = 0
    for entry in entries:
        if not entry.get("at_once"):
            continue
        rows = _rows(entry["at_once"])
        tables = (
            {"at_once": rows} if final is None else {"at_once": rows, "at_the_end": final[start : start + len(rows)]}
        )
        batch: dict[str, Any] = {"edit_batch": entry["edit_batch"]}
        batch |= {name: {k: float(v) for k, v in table_of(part).items()} for name, part in tables.items()}
        if final is not None:
            once, end = batch["at_once"], batch["at_the_end"]
            batch["forgotten"] = {name: once[name] - end[name] for name in METRICS if name in once}
        start += len(rows)
        batches.append(batch)
    return batches

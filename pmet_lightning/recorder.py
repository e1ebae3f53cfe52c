"""What a run leaves: state.json, contexts.json, ledger.jsonl, patch.safetensors, scores.json, a table."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from pmet_lightning.clock import PhaseClock
from pmet_lightning.data import EditBatch
from pmet_lightning.editable import EditableModel
from pmet_lightning.files import atomic_path, write_json
from pmet_lightning.ledger import ledger_lines
from pmet_lightning.metrics import METRICS
from pmet_lightning.metrics.scores import TEXTS, record_rows, table_of
from pmet_lightning.module import TargetOptimizer
from pmet_lightning.parallel import Team
from pmet_lightning.patch import save_patch
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
from pmet_lightning.spread import SpreadReport, WeightSpread
from pmet_lightning.targets import mean_curves

log = logging.getLogger(__name__)

STATE = "state.json"


class RunRecorder(L.Callback):
    """Writes the run folder; added by :class:`~pmet_lightning.trainer.EditTrainer` behind all callbacks.

    The patch is replaced as one file after each edit batch, and the manifest inside it says how many edit batches it
    holds, whatever ends the run; ledger and ``state.json`` follow it.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.records = True
        self.clock = PhaseClock()  # a callback too, in front of all others
        self._started = 0.0
        self._state: dict[str, Any] = {}
        self._ledger: list[str] = []
        self._layers: list[dict[str, Any]] = []
        self._batch_rows: list[Tensor] = []  # of each edit batch, judged right after it was written

    def check_free(self) -> None:
        """Refuse a folder that another run is in.

        Raises:
            FileExistsError: If there is one.
        """
        if (self.folder / STATE).exists():
            raise FileExistsError(
                f"the output folder {str(self.folder)!r} holds another run ({STATE}); expected a new one: set "
                "--trainer.run_dir to another folder, or leave it out to have one made"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that the work begins."""
        self.clock.end("moments")
        self._started = time.perf_counter()
        if self.records:
            self._save_state(trainer, status="running", edit_batches_written=0, edits_written=0)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The unedited model is judged."""
        self.clock.end("before")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store the contexts."""
        if self._writes(trainer) and isinstance(pl_module, TargetOptimizer):
            write_json(self.folder / "contexts.json", pl_module.contexts)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """After an edit batch is written: patch, ledger, state, in this order."""
        self.clock.end("spread")
        spread = find_callback(trainer, WeightSpread)
        if spread is None or spread.report is None:
            return
        assert isinstance(pl_module, TargetOptimizer)
        report = spread.report
        self._layers += [layer_line(report.edit_batch, layer) for layer in report.layers]
        pl_module.curves += mean_curves(report.targets)
        if self._writes(trainer):
            save_patch(self.folder / "patch.safetensors", spread.deltas, self._manifest(pl_module, spread))
        self._ledger += ledger_lines(pl_module, report)
        if self._writes(trainer):
            with atomic_path(self.folder / "ledger.jsonl") as temporary:
                temporary.write_text("\n".join(self._ledger) + "\n", encoding="utf-8")
        self.clock.end("ledger")
        if len(all_edits(trainer)) > len(report.edits):  # with a single edit batch the end says it all
            self._judge(trainer, pl_module, report)
        self.clock.end("after")
        self._save_state(trainer, edit_batches_written=report.edit_batch + 1, edits_written=len(self._ledger))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store and show the scores, and the report."""
        assert isinstance(pl_module, EditableModel)
        if not self._writes(trainer):
            return
        self.clock.end("after")
        batches = self._forgetting(pl_module)
        write_json(self.folder / "scores.json", pl_module.results | ({"edit_batches": batches} if batches else {}))
        self._report(trainer, pl_module, batches)
        self._save_state(trainer, status="finished")
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

    def _judge(self, trainer: L.Trainer, module: TargetOptimizer, report: SpreadReport) -> None:
        """Scores of an edit batch right after it was written, to be compared with those at the end."""
        team, count = Team.of(trainer), len(report.edits)
        positions = team.own(range(len(self._ledger) - count, len(self._ledger)))
        own = record_rows(module.evaluate(team.own(report.edits), positions))
        rows = team.gathered(own.to(module.device), count).cpu()
        self._batch_rows.append(rows)
        table = {f"edit_batches/{name}": float(value) for name, value in table_of(rows).items() if name in METRICS}
        for logger in trainer.loggers:
            logger.log_metrics(table, report.edit_batch)

    def _report(self, trainer: L.Trainer, module: EditableModel, batches: list[dict[str, Any]]) -> None:
        """Write report.html and report.json; show the figures in TensorBoard."""
        edits = edit_lines(all_edits(trainer), self._ledger, module.record_rows)
        data = {
            "title": self.folder.name,
            "model": module.model_name,
            "records": getattr(getattr(trainer, "datamodule", None), "path", None),
            "edits_count": len(all_edits(trainer)),
            "created": datetime.now().astimezone().isoformat(" ", "seconds"),
            "seconds": round(time.perf_counter() - self._started, 1),
            "scores": module.results,
            "edit_batches": batches,
            "curves": columns_of(module.curves),
            "layers": self._layers,
            "edits": edits,
            "relations": relation_lines(edits, module.record_rows),
            "settings": saved_settings(self.folder),
            "versions": versions(),
        }
        drawn = figures(data)
        self.clock.end("report")
        data["phases"] = {phase: round(seconds, 3) for phase, seconds in self.clock.seconds.items()}
        write_report(data, self.folder, drawn)
        for board in (logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)):
            for name, figure in drawn.items():
                board.experiment.add_figure(f"report/{name}", figure, module.inner_step)

    def _forgetting(self, module: EditableModel) -> list[dict[str, Any]]:
        """For each edit batch its scores right after it and after all of them, and the difference."""
        final = module.record_rows.get("after")
        batches: list[dict[str, Any]] = []
        if final is None:
            return batches
        start = 0
        for number, rows in enumerate(self._batch_rows):
            at_once, at_the_end = (
                {name: float(value) for name, value in table_of(part).items()}
                for part in (rows, final[start : start + len(rows)])
            )
            start += len(rows)
            lost = {name: at_once[name] - at_the_end[name] for name in METRICS if name in at_once}
            batches.append({"edit_batch": number, "at_once": at_once, "at_the_end": at_the_end, "forgotten": lost})
        return batches

    def _writes(self, trainer: L.Trainer) -> bool:
        """Whether this process writes the run folder."""
        return self.records and trainer.is_global_zero

    def _save_state(self, trainer: L.Trainer, **changes: Any) -> None:
        self._state |= changes
        if trainer.is_global_zero:
            write_json(self.folder / STATE, self._state)

    def _manifest(self, module: TargetOptimizer, spread: WeightSpread) -> dict[str, Any]:
        return {
            "model": module.model_name,
            "fingerprint": module.base_fingerprint,
            "dtype": str(next(module.model.parameters()).dtype).removeprefix("torch."),
            "layers": module.layers,
            "sites": spread.sites,
            "optimised": module.sites_optimised,
            "lam": spread.lam,
            "rule": spread.rule,
            "null_space": spread.null_space,
            "rules": vars(module.rules),
            "contexts": module.contexts,
            "edit_batches": spread.report.edit_batch + 1 if spread.report else 0,
            "edits": len(self._ledger) + (len(spread.report.edits) if spread.report else 0),
            "versions": versions(),
        }


def score_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A small table of the scores, with 95 % intervals: a row for each time they were taken.

    Below each stands how often the answer was in what the model said freely.
    """
    lines = [f"{'':8}" + "".join(f"{name:>24}" for name in METRICS)]
    for phase, table in results.items():
        for label, suffix in ((phase, ""), ("  freely", "_contains")):
            if suffix == "" or any(f"{name}{suffix}" in table for name in METRICS):
                cells = [score_cell(table, f"{name}{suffix}") for name in METRICS]
                lines.append(f"{label:8}" + "".join(f"{cell:>24}" for cell in cells))
    counts = {int(table["count"]) for table in results.values() if "count" in table}
    return "\n".join([*lines, f"records: {', '.join(map(str, sorted(counts)))}"])


def score_cell(table: Mapping[str, float], name: str) -> str:
    """A score with its interval, or a dash."""
    return f"{table[name]:.1f} [{table[f'{name}_low']:.1f}, {table[f'{name}_high']:.1f}]" if name in table else "-"


def other_lines(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What else was measured: text that has nothing to do with the edits, texts about what was edited."""
    lines = []
    for name in ("perplexity", "kl", "specificity_kept", *TEXTS):
        values = [f"{phase} {table[name]:.4g}" for phase, table in results.items() if name in table]
        if values:
            lines.append(f"{name.replace('_', ' ')}: {', '.join(values)}")
    return lines


def forgetting_lines(batches: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each edit batch lost to those after it."""
    if not batches:
        return []
    lines = [f"{'batch':8}" + "".join(f"{name:>24}" for name in METRICS) + "   (at once, then at the end)"]
    for batch in batches:
        once, end = batch["at_once"], batch["at_the_end"]
        cells = [f"{once[n]:.1f}, {end[n]:.1f}" if n in once and n in end else "-" for n in METRICS]
        lines.append(f"{batch['edit_batch']:<8}" + "".join(f"{cell:>24}" for cell in cells))
    return lines

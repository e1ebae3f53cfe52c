"""What a run leaves: state.json, contexts.json, ledger.jsonl, patch.safetensors, scores.json, a table."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from pmet_lightning.data import EditBatch
from pmet_lightning.files import atomic_path, write_json
from pmet_lightning.ledger import ledger_lines
from pmet_lightning.metrics import METRICS
from pmet_lightning.module import TargetOptimizer
from pmet_lightning.patch import save_patch
from pmet_lightning.progress import find_callback
from pmet_lightning.spread import WeightSpread

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
        self._state: dict[str, Any] = {}
        self._ledger: list[str] = []

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
        if self.records:
            self._save_state(status="running", edit_batches_written=0, edits_written=0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store the contexts and the scores of the unedited model."""
        assert isinstance(pl_module, TargetOptimizer)
        if self.records:
            write_json(self.folder / "contexts.json", pl_module.contexts)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """After an edit batch is written: patch, ledger, state, in this order."""
        assert isinstance(pl_module, TargetOptimizer)
        spread = find_callback(trainer, WeightSpread)
        if spread is None or spread.report is None:
            return
        report = spread.report
        save_patch(self.folder / "patch.safetensors", spread.deltas, self._manifest(pl_module, spread))
        self._ledger += ledger_lines(pl_module, report)
        with atomic_path(self.folder / "ledger.jsonl") as temporary:
            temporary.write_text("\n".join(self._ledger) + "\n", encoding="utf-8")
        self._save_state(edit_batches_written=report.edit_batch + 1, edits_written=len(self._ledger))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store and show the scores."""
        assert isinstance(pl_module, TargetOptimizer)
        if not self.records:
            return
        write_json(self.folder / "scores.json", pl_module.results)
        self._save_state(status="finished")
        log.info("%s\nrun folder: %s", score_table(pl_module.results), self.folder)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say how the run ended, and that the patch holds whole edit batches only."""
        if self._state:
            status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
            self._save_state(status=status, error=f"{type(exception).__name__}: {exception}")

    def _save_state(self, **changes: Any) -> None:
        self._state |= changes
        write_json(self.folder / STATE, self._state)

    def _manifest(self, module: TargetOptimizer, spread: WeightSpread) -> dict[str, Any]:
        packages = ("pmet-lightning", "torch", "lightning", "transformers")
        return {
            "model": module.model_name,
            "fingerprint": module.base_fingerprint,
            "dtype": str(next(module.model.parameters()).dtype).removeprefix("torch."),
            "layers": module.layers,
            "sites": spread.sites,
            "optimised": module.sites_optimised,
            "lam": spread.lam,
            "rule": spread.rule,
            "steps": module.steps,
            "clamp": module.clamp,
            "loss_weights": vars(module.weights),
            "contexts": module.contexts,
            "edit_batches": spread.report.edit_batch + 1 if spread.report else 0,
            "edits": len(self._ledger) + (len(spread.report.edits) if spread.report else 0),
            "versions": {name: importlib.metadata.version(name) for name in packages}
            | {"python": platform.python_version()},
        }


def score_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A small table of the scores, with 95 % intervals: a row for each time they were taken.

    Below each stands how often the answer was in what the model said freely.
    """
    lines = [f"{'':8}" + "".join(f"{name:>24}" for name in METRICS)]
    for phase, table in results.items():
        for label, suffix in ((phase, ""), ("  freely", "_contains")):
            if suffix == "" or any(f"{name}{suffix}" in table for name in METRICS):
                cells = [_cell(table, f"{name}{suffix}") for name in METRICS]
                lines.append(f"{label:8}" + "".join(f"{cell:>24}" for cell in cells))
    counts = {int(table["count"]) for table in results.values() if "count" in table}
    return "\n".join([*lines, f"records: {', '.join(map(str, sorted(counts)))}"])


def _cell(table: Mapping[str, float], name: str) -> str:
    return f"{table[name]:.1f} [{table[f'{name}_low']:.1f}, {table[f'{name}_high']:.1f}]" if name in table else "-"

"""What one call of :meth:`~pmet_lightning.editor.editor.Editor.edit` did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L

from pmet_lightning.data.datamodule import EditBatch
from pmet_lightning.report.run_data import layer_line
from pmet_lightning.report.tables import other_lines, score_table
from pmet_lightning.run.ledger import ledger_lines
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.callbacks import find_callback
from pmet_lightning.write.weight_spread import WeightSpread


@dataclass(frozen=True)
class EditReport:
    """What one call of ``Editor.edit`` did; printed, it is the table of the command line.

    Attributes:
        scores: ``before`` and ``after``, as in ``scores.json``: percentages and their 95 % intervals. Empty where
            nothing was evaluated.
        edits: A line for every edit, as in ``ledger.jsonl``: steps, why it stopped, P(o*) before and after, what is
            left of the residual, what the model says now.
        layers: A line for every write: residual before it, ‖ΔW‖ / ‖W‖, how much of ΔW the stored weight has.
        ended: Why a limit of the section ``drift`` ended the call early; empty otherwise.
    """

    scores: Mapping[str, Mapping[str, float]]
    edits: tuple[Mapping[str, Any], ...]
    layers: tuple[Mapping[str, Any], ...]
    ended: str = ""

    def __str__(self) -> str:
        batches = len({line["edit_batch"] for line in self.layers})
        lines = [f"{len(self.edits)} edits written in {batches} edit batch{'es' * (batches != 1)}"]
        if self.scores:
            lines += [score_table(self.scores), *other_lines(self.scores)]
        return "\n".join([*lines, *([f"ended: {self.ended}"] if self.ended else [])])


class KeptBatches(L.Callback):
    """Keeps what each edit batch left; stands behind the callbacks that write it and that may take it back."""

    def __init__(self) -> None:
        self.count = 0
        self.edits: list[Mapping[str, Any]] = []
        self.layers: list[Mapping[str, Any]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Measure the edits on the model just written."""
        spread = find_callback(trainer, WeightSpread)
        if spread is None or spread.report is None:
            return
        assert isinstance(pl_module, TargetOptimizer)
        self.count += 1
        self.edits += [json.loads(line) for line in ledger_lines(pl_module, spread.report)]
        self.layers += [layer_line(spread.report.edit_batch, layer) for layer in spread.report.layers]

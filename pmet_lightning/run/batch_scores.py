"""A callback that scores the edits of each edit batch right after it, and those of a stream right before it too."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from pmet_lightning.data.datamodule import EditBatch
from pmet_lightning.evaluation.answers import AnswerLine, answer_line, joined
from pmet_lightning.evaluation.editable import EditableModel, Phase
from pmet_lightning.evaluation.scores import record_rows
from pmet_lightning.utils.callbacks import all_edits, is_stream
from pmet_lightning.utils.distributed import ProcessGroup


class BatchScores(L.Callback):
    """Adds ``outputs["rows_before"]`` (for a stream), ``outputs["rows_at_once"]`` and, for a stream, its answers.

    For a single edit batch the evaluations before and after the run are enough.
    """

    def __init__(self) -> None:
        self._rows_before: Tensor | None = None
        self._answers_before: list[AnswerLine] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: EditBatch, batch_idx: int
    ) -> None:
        """Score the edits of a stream before they are written."""
        self._rows_before = None
        if is_stream(trainer) and batch.edits:
            self._rows_before, self._answers_before = _evaluate(trainer, pl_module, batch, "before")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Score the edits that were written, unless they are all edits of the run."""
        if outputs is None or "written" not in outputs:
            return
        if self._rows_before is not None:
            outputs["rows_before"] = self._rows_before
        if is_stream(trainer) or len(all_edits(trainer)) > len(batch.edits):
            outputs["rows_at_once"], answers = _evaluate(trainer, pl_module, batch, "after")
            if self._rows_before is not None:
                pairs = zip(self._answers_before, answers, strict=True)
                outputs["answers"] = [joined({"before": before, "after": after}) for before, after in pairs]


def _evaluate(
    trainer: L.Trainer, module: L.LightningModule, batch: EditBatch, phase: Phase
) -> tuple[Tensor, list[AnswerLine]]:
    """Score rows and answers of an edit batch on the model as it is now; each process asks about its own edits."""
    assert isinstance(module, EditableModel)
    processes, count = ProcessGroup.of(trainer), len(batch.edits)
    with trainer.profiler.profile(phase):
        own = processes.shard(batch.edits)
        results = module.evaluate(own, processes.shard(batch.positions))
        answers = [answer_line(edit, result) for edit, result in zip(own, results, strict=True)]
        rows = processes.all_gather(record_rows(results).to(module.device), count).cpu()
        return rows, processes.all_gather_objects(answers, count)

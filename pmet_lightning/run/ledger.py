"""One line for every edit: how its target was found, the residual left after the write, the model's answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L

from pmet_lightning.data.datamodule import EditBatch
from pmet_lightning.data.encoder import fill
from pmet_lightning.data.records import Edit, Probe
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.evaluation.generation import says
from pmet_lightning.evaluation.probes import score_probes
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.callbacks import find_callback
from pmet_lightning.utils.distributed import ProcessGroup
from pmet_lightning.write.weight_spread import WeightSpread
from pmet_lightning.write.write_report import WriteReport


class EditLedger(L.Callback):
    """Measures each edit batch once, on the model just written, for all callbacks that follow (``outputs["ledger"]``).

    Args:
        keep: Whether lines and layers of all edit batches are kept here too.

    Attributes:
        edits: The lines, if they are kept.
        layers: A line for every write, likewise.
        count: Number of edit batches, likewise.
    """

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.edits: list[dict[str, Any]] = []
        self.layers: list[dict[str, Any]] = []
        self.count = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Measure what was written, unless it was taken back because of a limit."""
        if outputs is None or "written" not in outputs:
            return
        assert isinstance(pl_module, TargetOptimizer)
        report: WriteReport = outputs["written"]
        outputs["ledger"] = measure_ledger(pl_module, report)
        spread = find_callback(trainer, WeightSpread)
        if spread is not None:
            spread.edited.record_outcomes(outputs["ledger"])
        if self.keep:
            self.count += 1
            self.edits += outputs["ledger"]
            self.layers += report.layer_lines()


def measure_ledger(module: TargetOptimizer, report: WriteReport) -> list[dict[str, Any]]:
    """Lines of one edit batch, measured on the model just written; each process measures its own edits."""
    processes, count = ProcessGroup.of(module.trainer), len(report.edits)
    own = processes.shard(range(count))
    probes = [[Probe("efficacy", report.edits[i].question, report.edits[i].target)] for i in own]
    scores = score_probes(module.model, module.encoder, probes, module.tokens_per_batch, module.device)
    answers = module.greedy_answers([report.edits[i].question for i in own])
    solve_error = {layer.name: layer.solve_error for layer in report.layers}
    lines = []
    for i, score, answer in zip(own, scores, answers, strict=True):
        edit = report.edits[i]
        lines.append(
            {
                "case_id": edit.case_id,
                "edit_batch": report.edit_batch,
                "prompt": edit.prompt,
                "subject": edit.subject,
                "target": edit.target,
                "target_true": edit.target_true,
                "relation": edit.relation,
                **report.targets[i].record,
                "solve_error": solve_error,
                "residual_left": report.residual_left[i],
                "p_prompt_after": score[0].magnitude,
                "answer": answer,
                "said": any(says(answer, form) for form in _accepted(edit)),
            }
        )
    return processes.all_gather_objects(lines, count)


def ask_again(module: EditableModel, lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """What the model, as it is now, says to the edit prompts of some ledger lines, and whether it is their target.

    Args:
        module: The module with the model; all processes of its run take part, each with its own lines.
        lines: Ledger lines, the same on every process.
    """
    processes = ProcessGroup.of(module.trainer)
    own = processes.shard(lines)
    answers = module.greedy_answers([fill(line["prompt"], line["subject"])[0] for line in own])
    found = [(answer, says(answer, line["target"])) for answer, line in zip(answers, own, strict=True)]
    return processes.all_gather_objects(found, len(lines))


def _accepted(edit: Edit) -> list[str]:
    """All forms of the new object that count as said."""
    forms = [form for probe in edit.probes if probe.kind == "efficacy" for form in probe.answers]
    return list(dict.fromkeys([edit.target, *forms]))

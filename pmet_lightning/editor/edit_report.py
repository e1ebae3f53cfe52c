"""What one call of :meth:`~pmet_lightning.editor.editor.Editor.edit` did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmet_lightning.report.tables import other_lines, score_table


@dataclass(frozen=True)
class EditReport:
    """What one call of ``Editor.edit`` did; printed, it is the table of the command line.

    Attributes:
        scores: ``before`` and ``after``, as in ``scores.json``: percentages and their 95 % intervals. Empty if
            nothing was evaluated.
        edits: One record per edit, as in ``ledger.jsonl``: steps, stop reason, P(o*) before and after, remaining
            residual, what the model says now.
        layers: One record per write: residual before it, ‖ΔW‖ / ‖W‖, how much of ΔW the stored weight keeps.
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

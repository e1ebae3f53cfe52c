"""How a run ended: the outcome of each edit, and the verdict over all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L

from pmet_lightning.evaluation.answers import AnswerLine, edit_answer, joined
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.evaluation.verdict import Damage, Outcome, Verdict, judge, outcomes, to_ask_again
from pmet_lightning.run.ledger import ask_again
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.callbacks import all_edits, find_callback
from pmet_lightning.utils.distributed import ProcessGroup
from pmet_lightning.write.drift import Drift

# Of a ledger line: what an outcome depends on, and what the question is. A stream may have millions of lines.
_NEEDED = ("subject", "prompt", "target", "edit_batch", "p_after", "stop_reason", "p_prompt_after", "answer", "said")


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Attributes:
        edits: The outcome of each edit that was written, in order.
        verdict: The verdict over all of them.
    """

    edits: tuple[Outcome, ...]
    verdict: Verdict


def needed_lines(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ledger lines without what an outcome does not depend on."""
    return [{name: line[name] for name in _NEEDED if name in line} for line in lines]


def outcome_of(
    trainer: L.Trainer, module: EditableModel, lines: Sequence[Mapping[str, Any]], undone: Collection[str] = ()
) -> RunOutcome:
    """Judge a run that has just ended, on the model as it is now; all processes take part.

    Edits whose answer at the end is not known from an evaluation are asked again if a later edit batch has written
    something else about their subject.

    Args:
        trainer: The trainer.
        module: Its module.
        lines: Ledger lines of the edits that were written, on the first process; any on the others.
        undone: Questions of facts of earlier calls that are no longer answered.
    """
    if not isinstance(module, TargetOptimizer):
        lines = [{"subject": edit.subject, "target": edit.target} for edit in all_edits(trainer)]
    asked = {i: found for i, line in module.answers.get("after", {}).items() if (found := edit_answer(line))}
    if isinstance(module, TargetOptimizer):
        asked |= _asked_again(trainer, module, lines, asked)
    ended = outcomes(lines, asked)
    batches = {line.get("edit_batch") for line in lines}
    at_the_end = len(batches) < 2 or all(i in asked for i in range(len(lines)))
    drift = find_callback(trainer, Drift)
    damage = Damage("not measured") if drift is None else drift.damage(module.results)
    return RunOutcome(tuple(ended), judge(ended, damage, at_the_end, undone))


def _asked_again(
    trainer: L.Trainer, module: TargetOptimizer, lines: Sequence[Mapping[str, Any]], asked: Collection[int]
) -> dict[int, tuple[str, bool]]:
    processes = ProcessGroup.of(trainer)
    positions, chosen = processes.compute_object_on_rank_zero(lambda: _chosen(lines, asked))
    return dict(zip(positions, ask_again(module, chosen), strict=True)) if positions else {}


def _chosen(lines: Sequence[Mapping[str, Any]], asked: Collection[int]) -> tuple[list[int], list[Mapping[str, Any]]]:
    positions = to_ask_again(lines, asked)
    return positions, [lines[i] for i in positions]


def answers_before_and_after(module: EditableModel) -> list[AnswerLine]:
    """The questions of each edit with the answers of the evaluations before and after the run, by position."""
    before, after = (module.answers.get(phase, {}) for phase in ("before", "after"))
    positions = sorted({*before, *after})
    return [joined({"before": before.get(i), "after": after.get(i)}) for i in positions]

"""What an editor has written, call by call, so that it can be taken back, and facts found in it by what people say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from typing import Any

from pmet_lightning.data.records import Edit
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.model.patch import add_deltas
from pmet_lightning.write.edited_weights import EditedWeights, Snapshot
from pmet_lightning.write.facts import WrittenFact


@dataclass(frozen=True)
class Step:
    """The state before one call.

    Attributes:
        state: What was written by then. Its weights are kept for the last call only, as they are large.
        batches: Number of edit batches.
        edits: Number of edits.
    """

    state: Snapshot
    batches: int
    edits: int

    def light(self) -> Step:
        """The same without weights."""
        state = self.state
        return Step(Snapshot([], state.deltas, state.past_keys, state.facts), self.batches, self.edits)


class History:
    """The steps of an editor.

    Args:
        edited: What is written.
        module: The module with the model.
    """

    def __init__(self, edited: EditedWeights, module: EditableModel) -> None:
        self._edited, self._module = edited, module
        self._clean: Snapshot | None = None  # before the first edit
        self._steps: list[Step] = []

    def add(self, before: Snapshot, batches: int, edits: int) -> None:
        """Record a call.

        Args:
            before: The state before it.
            batches: Number of edit batches at that time.
            edits: Number of edits at that time.
        """
        self._clean = self._clean or before
        self._steps = [*(step.light() for step in self._steps), Step(before, batches, edits)]

    def __len__(self) -> int:
        return len(self._steps)

    def back(self, steps: int) -> Step:
        """Return to the state before the last so many calls; exact for the last one, and where nothing is left.

        Returns:
            The step before which the editor now is.
        """
        step, self._steps = self._steps[-steps], self._steps[:-steps]
        if step.state.weights:
            self._edited.restore(step.state)
        else:
            self.restore_clean()
            self._add(step.state)
        return step

    def restore_clean(self) -> None:
        """Take everything back, bit for bit."""
        if self._clean is not None:
            self._edited.restore(self._clean)

    def clear(self) -> None:
        """Forget all calls: nothing is written."""
        self._steps = []

    def _add(self, state: Snapshot) -> None:
        """Write the total ΔW of a state into the clean weights."""
        add_deltas(self._module.model, state.deltas)
        self._edited.resume(state.deltas, state.past_keys, state.facts)


def positions_of(facts: Sequence[WrittenFact], wanted: Any) -> list[int]:
    """Positions of written facts that something names.

    Args:
        facts: The written facts.
        wanted: A subject, a question with its subject filled in, or a case id; a record or an Edit with the prompt and
            the subject; or several of these.

    Raises:
        ValueError: If one of them names no written fact; the message shows near ones.
    """
    items = [wanted] if isinstance(wanted, (str, Mapping, Edit)) else list(wanted)
    found: list[int] = []
    for item in items:
        positions = [i for i, fact in enumerate(facts) if _names(item, fact)]
        if not positions:
            raise ValueError(_not_written(item, facts))
        found += positions
    return sorted(set(found))


def _names(item: Any, fact: WrittenFact) -> bool:
    if isinstance(item, Edit):
        return fact.question == (item.prompt, item.subject)
    if isinstance(item, Mapping):
        return fact.question == (item.get("prompt"), item.get("subject"))
    return str(item) in (fact.edit.question, fact.edit.subject, fact.edit.case_id)


def _not_written(item: Any, facts: Sequence[WrittenFact]) -> str:
    known = [text for fact in facts for text in (fact.edit.question, fact.edit.subject)]
    near = get_close_matches(str(item), known, n=3)
    shown = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"no written fact is named by {item!r}: expected a subject, a question with its subject, or a case id of one "
        f"of the {len(facts)} facts{shown}"
    )


def by_batches(facts: Iterable[WrittenFact]) -> list[list[WrittenFact]]:
    """Facts in order, divided into their edit batches."""
    return [list(group) for _, group in groupby(facts, key=lambda fact: fact.edit_batch)]

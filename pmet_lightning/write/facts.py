"""The facts that are in the weights: what each was, its target, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pmet_lightning.data.records import Edit
from pmet_lightning.model.architectures import ProjectionId
from pmet_lightning.targets.store import Target, name_values, values_of_names

_FIELDS = ("case_id", "prompt", "subject", "target", "target_true", "relation")


@dataclass(frozen=True)
class WrittenFact:
    """One edit that was written.

    Attributes:
        edit: The edit; in one that was read from a patch, without its questions.
        edit_batch: Number of its edit batch.
        values: v* of each optimized site in each layer that has a target, shape [F], on the CPU.
        answer: What the model said to the edit prompt right after the edit batch was written, if it was asked.
        said: Whether that was the new object.
    """

    edit: Edit
    edit_batch: int
    values: Mapping[ProjectionId, Tensor] = field(repr=False)
    answer: str | None = None
    said: bool | None = None

    @property
    def question(self) -> tuple[str, str]:
        """Prompt and subject: a later fact with the same ones replaces this one."""
        return self.edit.prompt, self.edit.subject

    @property
    def given_target(self) -> Target:
        """Its target, to be written again."""
        return Target(dict(self.values), {}, torch.empty(0, 0))

    def plain(self) -> dict[str, Any]:
        """Everything but the target, as JSON has it."""
        described = {name: getattr(self.edit, name) for name in _FIELDS}
        return described | {"edit_batch": self.edit_batch, "answer": self.answer, "said": self.said}


def written_facts(edits: Sequence[Edit], targets: Sequence[Target], edit_batch: int) -> tuple[WrittenFact, ...]:
    """The facts of an edit batch that has just been written."""
    return tuple(WrittenFact(edit, edit_batch, target.values) for edit, target in zip(edits, targets, strict=True))


def replaced_by(facts: Sequence[WrittenFact], edits: Iterable[Edit]) -> list[int]:
    """Positions of the facts whose prompt and subject new edits have too: they are corrected."""
    questions = {(edit.prompt, edit.subject) for edit in edits}
    return [i for i, fact in enumerate(facts) if fact.question in questions]


def with_outcomes(facts: Sequence[WrittenFact], lines: Iterable[Mapping[str, Any]]) -> tuple[WrittenFact, ...]:
    """The facts with what became of them.

    Args:
        facts: The facts.
        lines: Ledger lines, of some of them.
    """
    known = {(line["prompt"], line["subject"], line["edit_batch"]): line for line in lines}
    found = [(fact, known.get((*fact.question, fact.edit_batch))) for fact in facts]
    return tuple(
        fact if line is None else replace(fact, answer=line["answer"], said=line["said"]) for fact, line in found
    )


def stacked_values(facts: Sequence[WrittenFact]) -> dict[str, Tensor]:
    """v* of all facts by the name of site and layer, shape [N, F]."""
    places = facts[0].values if facts else ()
    return name_values({place: torch.stack([fact.values[place] for fact in facts]) for place in places})


def facts_of(lines: Sequence[Mapping[str, Any]], values: Mapping[str, Tensor], origin: str) -> tuple[WrittenFact, ...]:
    """The facts of :meth:`WrittenFact.plain` and :func:`stacked_values`; ``origin`` is named in messages."""
    stacked = values_of_names(values)
    return tuple(
        WrittenFact(
            Edit(**{name: line[name] for name in _FIELDS}, origin=f"{origin}, fact {i}"),
            line["edit_batch"],
            {place: values_NF[i] for place, values_NF in stacked.items()},
            line["answer"],
            line["said"],
        )
        for i, line in enumerate(lines)
    )

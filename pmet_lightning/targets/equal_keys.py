"""Edits whose keys are equal: one key can have only one value, so they share their target.

Facts about one subject in prompts that are the same up to its end ("{} was born in", "{} works as") have the same key
in every layer. Targets found for each apart contradict each other, and the write takes their mean (MEMIT-Merge). One
that is written later moves the value of those before it: their targets are found again together, and their key, as it
has a new value, is not protected against this write.

Legend: A = active edits, F = model width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pmet_lightning.data.edit_rows import BARE, key_row
from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.data.records import Edit


@dataclass(frozen=True)
class KeyGroups:
    """Which edits have equal keys.

    Attributes:
        first: For each edit the index of the first edit that has its key; its own where no earlier one has it.
    """

    first: list[int]

    @classmethod
    def of(cls, edits: Sequence[Edit], encoder: PromptEncoder) -> KeyGroups:
        """The groups of some edits; edits that are not of one subject have different keys."""
        counts = Counter(edit.subject for edit in edits)
        first: dict[tuple[int, ...], int] = {}
        found = []
        for i, edit in enumerate(edits):
            shared = counts[edit.subject] > 1
            found.append(first.setdefault(_key(edit, encoder), i) if shared else i)
        return cls(found)

    @property
    def all_alone(self) -> bool:
        """Whether all keys are different."""
        return len(set(self.first)) == len(self.first)

    def members(self) -> dict[int, list[int]]:
        """The edits of each group, by its first one."""
        found: dict[int, list[int]] = {}
        for i, first in enumerate(self.first):
            found.setdefault(first, []).append(i)
        return found

    def sharers(self, edits: Sequence[Edit]) -> dict[str, frozenset[str]]:
        """For each edit, by its identity, the identities of those that share its target, its own among them."""
        groups = [frozenset(edits[i].identity() for i in group) for group in self.members().values()]
        return {name: group for group in groups for name in group}

    def identities(self, edits: Sequence[Edit]) -> list[str]:
        """What the target of each edit depends on: the edit itself and, after it, those that share the target."""
        own = [edit.identity() for edit in edits]
        shared = {first: sorted(own[i] for i in group) for first, group in self.members().items() if len(group) > 1}
        return [name + "".join(shared.get(first, ())) for name, first in zip(own, self.first, strict=True)]


def companions(edits: Sequence[Edit], written: Sequence[Edit], encoder: PromptEncoder) -> list[int]:
    """Positions of edits written earlier that have the key of one of an edit batch, and that it does not correct."""
    subjects = {edit.subject for edit in written} & {edit.subject for edit in edits}
    asked = {(edit.prompt, edit.subject) for edit in edits}
    keys = {_key(edit, encoder) for edit in edits if edit.subject in subjects}
    return [
        i
        for i, edit in enumerate(written)
        if edit.subject in subjects and (edit.prompt, edit.subject) not in asked and _key(edit, encoder) in keys
    ]


def _key(edit: Edit, encoder: PromptEncoder) -> tuple[int, ...]:
    """What the key of an edit depends on: the tokens up to its subject's end."""
    return tuple(key_row(edit, BARE, encoder).ids)


def mean_of_groups(values_AF: Tensor, group_A: Tensor) -> Tensor:
    """The mean over the edits of each group, for each of its edits, shape [A, F].

    Args:
        values_AF: A value of each edit.
        group_A: Number of its group, int64.
    """
    count = int(group_A.max()) + 1
    sums_GF = values_AF.new_zeros(count, values_AF.shape[1]).index_add_(0, group_A, values_AF)
    sizes_G = torch.bincount(group_A, minlength=count).to(values_AF)
    return (sums_GF / sizes_G.clamp_min(1).unsqueeze(1))[group_A]


def all_of_group(true_A: Tensor, group_A: Tensor) -> Tensor:
    """Whether something is true of all edits of an edit's group, bool, shape [A]."""
    return mean_of_groups(true_A.to(torch.float32).unsqueeze(1), group_A)[:, 0] == 1

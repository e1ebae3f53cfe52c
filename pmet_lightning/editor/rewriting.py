"""Written facts solved again from their targets, in other edit batches than before: some removed, patches merged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer

from pmet_lightning.data.datamodule import EditDataModule
from pmet_lightning.data.records import Edit
from pmet_lightning.targets.equal_keys import companions
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.write.facts import WrittenFact

log = logging.getLogger(__name__)


def write_again(
    batches: Sequence[Sequence[WrittenFact]],
    before: Sequence[Sequence[Sequence[WrittenFact]]],
    module: TargetOptimizer,
    trainer: Trainer,
) -> None:
    """Write facts into a model without them, from the targets that they had.

    A target that a fact does not share with the same others as before, as facts about one subject may, is found again.

    Args:
        batches: The facts in the edit batches to write.
        before: All facts in the edit batches that their targets were found in, for each model that they were written
            into; of a fact that was written into several, its target is that of the first.
        module: The module with the model.
        trainer: A trainer with the callbacks that write.
    """
    shared = _sharers(batches, module)
    shared_before: dict[str, frozenset[str]] = {}
    for written in before:
        shared_before = _sharers(written, module) | shared_before
    facts = [(fact, fact.edit.identity()) for batch in batches for fact in batch]
    given = [fact.given_target if shared[name] == shared_before[name] else None for fact, name in facts]
    if None in given:
        log.info("%d facts share a target with others than before: it is found again", given.count(None))
    data = EditDataModule.of_batches([[fact.edit for fact in batch] for batch in batches], module.tokenizer)
    data.setup("fit")
    module.given_targets = given
    try:
        trainer.fit(module, data)
    finally:
        module.given_targets = []


def outcomes_of(batches: Sequence[Sequence[WrittenFact]]) -> list[dict[str, Any]]:
    """What became of facts, with the numbers of the edit batches that they are in now."""
    return [{**fact.plain(), "edit_batch": i} for i, batch in enumerate(batches) for fact in batch]


def _sharers(batches: Sequence[Sequence[WrittenFact]], module: TargetOptimizer) -> dict[str, frozenset[str]]:
    """The facts that share the target of each, by their identity, with those of earlier edit batches."""
    found: dict[str, frozenset[str]] = {}
    earlier: list[Edit] = []
    for batch in batches:
        own = [fact.edit for fact in batch]
        edits = [*own, *(earlier[i] for i in companions(own, earlier, module.encoder))]
        sharers = module.key_groups(edits).sharers(edits)
        found |= {name: sharers[name] for edit in own if (name := edit.identity()) not in found}
        earlier += own
    return found

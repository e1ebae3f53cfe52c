"""A baseline that changes no weight: every question that names an edited subject is asked with the new fact before it.

The retrieval is exact: a fact is found by its subject's name. That makes it an upper bound for what a fact in the
prompt can do, at the cost of longer prompts for ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pmet_lightning.data.datamodule import EditBatch
from pmet_lightning.data.join import join_of
from pmet_lightning.data.records import Edit
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.evaluation.probes import RecordResult


class Retrieval(EditableModel):
    """Answers with the edits' facts in the prompt; the "fit" only takes note of them.

    Args:
        model_name: A folder made by save_pretrained, a GGUF file, a hub name, or the shipped 'atlas'.
        kwargs: Everything that :class:`~pmet_lightning.evaluation.editable.EditableModel` takes.
    """

    def __init__(self, model_name: str, **kwargs: Any) -> None:
        super().__init__(model_name, **kwargs)
        self.automatic_optimization = False
        self._facts: dict[str, list[str]] = defaultdict(list)  # sentences by subject

    def configure_optimizers(self) -> Any:
        """Nothing is optimized."""
        return []

    def training_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Take note of the facts."""
        for edit in batch.edits:
            join = join_of(edit.question, edit.target, self.encoder.join)
            self._facts[edit.subject].append(f"{edit.question}{join}{edit.target}. ")

    def evaluate(self, edits: Sequence[Edit], positions: Sequence[int]) -> list[RecordResult]:
        """As for any model, with the facts known so far before every text that names their subject."""
        return super().evaluate([self._with_facts(edit) for edit in edits], positions)

    def _with_facts(self, edit: Edit) -> Edit:
        return replace(
            edit,
            probes=tuple(replace(probe, prompt=self._retrieve(probe.prompt)) for probe in edit.probes),
            generation_prompts=tuple(map(self._retrieve, edit.generation_prompts)),
        )

    def _retrieve(self, prompt: str) -> str:
        found = [sentence for subject, facts in self._facts.items() if subject in prompt for sentence in facts]
        return "".join(found) + prompt

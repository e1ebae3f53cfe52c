"""Streams edits as micro-batches that never cross the border of an edit batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader, Sampler

from pmet_lightning.edits import Edit, RecordError, read_edits
from pmet_lightning.language_model import load_tokenizer
from pmet_lightning.tokens import LocationError, PromptEncoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditBatch:
    """One micro-batch.

    Attributes:
        edits: What is optimised together.
        edit_batch: Number of the edit batch it belongs to, from 0.
        closes: Whether it is the last of its edit batch, so that the weights are written after it.
        positions: Places of its edits among all of them, from 0.
    """

    edits: tuple[Edit, ...]
    edit_batch: int
    closes: bool
    positions: tuple[int, ...]


class MicroBatchSampler(Sampler[list[tuple[int, int, bool]]]):
    """Indices of each micro-batch, with the number of its edit batch and whether it closes it.

    Args:
        count: Edits.
        edit_batch: Edits of an edit batch.
        micro_batch: Edits of a micro-batch.
        rank: Number of this process; it gets every ``world_size``-th micro-batch.
        world_size: How many processes there are. One that would get nothing gets the last micro-batch once more, since
            Lightning leaves out the whole loop, and what the processes do together in it, where there is nothing.
    """

    def __init__(self, count: int, edit_batch: int, micro_batch: int, rank: int = 0, world_size: int = 1) -> None:
        everything = []
        for number, start in enumerate(range(0, count, edit_batch)):
            stop = min(start + edit_batch, count)
            for first in range(start, stop, micro_batch):
                last = min(first + micro_batch, stop)
                everything.append([(index, number, last == stop) for index in range(first, last)])
        self.batches = everything[rank::world_size] or everything[-1:]

    def __iter__(self) -> Iterator[list[tuple[int, int, bool]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _EditRows:
    """A map-style data set whose items carry their place in the edit batches."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: tuple[int, int, bool]) -> tuple[Edit, int, bool, int]:
        position, edit_batch, closes = index
        return Edit.from_row(self.rows[position]), edit_batch, closes, position


def _collate(items: Sequence[tuple[Edit, int, bool, int]]) -> EditBatch:
    edits, numbers, closes, positions = zip(*items, strict=True)
    return EditBatch(edits, numbers[0], closes[0], positions)


class EditDataModule(L.LightningDataModule):
    """Edits of a file or hub data set, checked before anything else starts.

    Two sizes: an *edit batch* is written into the weights by one solve, a *micro-batch* is what is optimised
    together in memory. Neither changes an edit's target vector.

    Args:
        path: Edits: a .json, .jsonl, .csv or .parquet file (COUNTERFACT, zsRE or flat records), a data set on
            the hub, or the shipped 'atlas-records'; or several of them.
        tokenizer: Where the tokenizer comes from; linked to the model's name on the command line.
        edit_batch: Edits written by one solve; null takes all of them.
        micro_batch: Edits optimised together.
        skip: Records left out at the beginning of the file.
        limit: Most records used; null takes all.
        shuffle: Seed of a shuffle of the records before that; null keeps the file's order.
        split: Split of a hub data set.
        evaluation_batch: Edits whose questions are evaluated together.
        chat: Whether prompts are a user's messages in a chat; linked to the module's on the command line.
    """

    def __init__(
        self,
        path: str | list[str],
        tokenizer: str = "",
        edit_batch: PositiveInt | None = None,  # type: ignore[valid-type]
        micro_batch: PositiveInt = 64,  # type: ignore[valid-type]
        skip: NonNegativeInt = 0,  # type: ignore[valid-type]
        limit: PositiveInt | None = None,  # type: ignore[valid-type]
        shuffle: int | None = None,
        split: str = "train",
        evaluation_batch: PositiveInt = 32,  # type: ignore[valid-type]
        chat: bool = False,
    ) -> None:
        super().__init__()
        self.path, self.split = path, split
        self.tokenizer_name, self.chat = tokenizer, chat
        self.edit_batch, self.micro_batch = edit_batch, micro_batch
        self.skip, self.limit, self.shuffle = skip, limit, shuffle
        self.evaluation_batch = evaluation_batch
        self.edits: list[Edit] = []
        self._rows: Sequence[Mapping[str, Any]] | None = None

    def setup(self, stage: str) -> None:
        """Read the edits and check each against the tokenizer.

        Raises:
            FileNotFoundError: If the file is not there.
            RecordError: If a record is unusable; the message names it.
        """
        if self._rows is not None:
            return
        import datasets

        edits = read_edits(self.path, split=self.split, skip=self.skip, limit=self.limit, shuffle=self.shuffle)
        self._check_tokens(edits)
        self.edits = edits
        self._rows = datasets.Dataset.from_list([edit.to_row() for edit in edits])
        log.info("%d edits from %s", len(edits), self.path)

    def _check_tokens(self, edits: Sequence[Edit]) -> None:
        encoder = PromptEncoder.of(load_tokenizer(self.tokenizer_name), self.chat)
        for edit in edits:
            try:
                encoder.encode(edit.prompt, edit.subject, target=edit.target)
            except LocationError as error:
                raise RecordError(f"{edit.origin}: {error}") from error

    def train_dataloader(self) -> DataLoader[EditBatch]:
        """Micro-batches, one edit batch after the other."""
        sampler = MicroBatchSampler(len(self.edits), self.edit_batch or len(self.edits), self.micro_batch)
        return self._loader(sampler)

    def val_dataloader(self) -> DataLoader[EditBatch]:
        """All edits with their questions, for the scores before and after; each process gets its part."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        count = len(self.edits)
        return self._loader(MicroBatchSampler(count, count, self.evaluation_batch, rank, world_size))

    def test_dataloader(self) -> DataLoader[EditBatch]:
        """The same as :meth:`val_dataloader`."""
        return self.val_dataloader()

    def _loader(self, sampler: MicroBatchSampler) -> DataLoader[EditBatch]:
        if self._rows is None:
            raise RuntimeError("EditDataModule.setup has not run; call it, or give the module to a Trainer")
        return DataLoader(_EditRows(self._rows), batch_sampler=sampler, collate_fn=_collate)  # type: ignore

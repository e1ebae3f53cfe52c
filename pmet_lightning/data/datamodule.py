"""The data module: edit batches to be written, and edits with their questions to be evaluated."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, IterableDataset, Sampler

from pmet_lightning.data.chat import Chat
from pmet_lightning.data.encoder import LocationError, PromptEncoder, check_characters, load_tokenizer
from pmet_lightning.data.fields import RecordError
from pmet_lightning.data.join import Join
from pmet_lightning.data.readers import read_edits, stream_edits
from pmet_lightning.data.records import Edit, ZsreTarget, check_no_contradictions, skip_written
from pmet_lightning.utils.distributed import ProcessGroup
from pmet_lightning.utils.types import NonNegativeFloat, NonNegativeInt, PositiveInt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditBatch:
    """Edits that are written by one solve, or evaluated together.

    Attributes:
        edits: The edits; none that a resumed run had already written.
        positions: Their indices among all edits, from 0.
    """

    edits: tuple[Edit, ...]
    positions: tuple[int, ...]


class BatchSampler(Sampler[list[int]]):
    """Consecutive indices, ``size`` at a time.

    Args:
        count: Number of edits.
        size: Edits per batch.
        rank: Rank of this process; it gets every ``world_size``-th batch.
        world_size: Number of processes. One that would get no batch gets the last one again, since Lightning skips an
            empty loop altogether, with the collective operations inside it.
    """

    def __init__(self, count: int, size: int, rank: int = 0, world_size: int = 1) -> None:
        batches = [list(range(first, min(first + size, count))) for first in range(0, count, size)]
        self.batches = batches[rank::world_size] or batches[-1:]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class EditBatches(IterableDataset[EditBatch]):
    """The edit batches of an epoch.

    Args:
        edits: Returns the edits that are not written yet; called once per epoch.
        size: Edits per batch.
        done: Number of edits that were written before them. One batch without edits is made for these, so that an epoch
            is never empty.
        count: Number of all edits, including those; ``None`` for a stream.
        processes: Process group whose rank zero reads for all, since the end of a growing file is not the same to all;
            where ``None``, each process reads for itself.
        check: Raises if the edits of a batch cannot be written together.
    """

    def __init__(
        self,
        edits: Callable[[], Iterator[Edit]],
        size: int,
        done: int,
        count: int | None,
        processes: ProcessGroup | None = None,
        check: Callable[[Sequence[Edit]], None] = lambda _: None,
    ) -> None:
        self.edits, self.size, self.done, self.count, self.processes = edits, size, done, count, processes
        self.check = check

    def __iter__(self) -> Iterator[EditBatch]:
        position = self.done
        if self.done:
            yield EditBatch((), ())
        edits = self.edits()
        while batch := self._next(edits):
            yield EditBatch(tuple(batch), tuple(range(position, position + len(batch))))
            position += len(batch)

    def __len__(self) -> int:
        # From a loader without a length, Lightning would fetch one batch ahead of the current one.
        return sys.maxsize if self.count is None else bool(self.done) + -(-(self.count - self.done) // self.size)

    def _next(self, edits: Iterator[Edit]) -> list[Edit]:
        def read() -> list[Edit]:
            batch = list(islice(edits, self.size))
            self.check(batch)
            return batch

        return read() if self.processes is None else self.processes.compute_object_on_rank_zero(read)


def _collate(items: Sequence[tuple[int, Edit]]) -> EditBatch:
    positions, edits = zip(*items, strict=True)
    return EditBatch(edits, positions)


class EditDataModule(L.LightningDataModule):
    """Edits of a file or hub data set, validated before anything else starts.

    An *edit batch* is written into the weights by one solve; how many of its edits are optimized together is the
    model's ``micro_batch``. A stream is read as the run advances: each edit batch is validated, written, evaluated and
    saved by itself, and nothing is evaluated before the first or after the last.

    Args:
        path: Edits: a .json, .jsonl, .csv or .parquet file (COUNTERFACT, zsRE or flat records), a data set on
            the hub, or the shipped 'atlas-records' or 'earth-records'; or a list of these.
        tokenizer: Folder or name of the tokenizer; linked to the model's name on the command line.
        edit_batch: Edits written by one solve; null takes all of them at once.
        skip: Number of records to skip at the beginning of the file.
        limit: Maximum number of records after that; null takes all.
        shuffle: Seed of a shuffle of the records before ``skip`` and ``limit``; null keeps the file's order.
        split: Split of a hub data set.
        zsre_target: The new object of a zsRE record: the first of ``answers``, the true one (MEMIT, PMET), or the
            counterfactual ``alt`` (EasyEdit, LocFT), whose old object is then the true one.
        evaluation_batch: Edits whose questions are evaluated together.
        chat: Whether prompts are user messages in a chat; linked to the model's setting on the command line.
        join: How prompts and answers are joined; linked likewise.
        trust_remote_code: Whether code in the tokenizer's folder may run; linked likewise.
        stream: Whether edits arrive during the run: from a .jsonl file that may grow, or a hub data set of any size.
            Needs ``edit_batch``.
        stream_wait: Seconds to wait for further lines at the end of a stream's file; then the last edit batch is
            written, however small. A run with --trainer.resume continues with what has arrived since.
    """

    def __init__(
        self,
        path: str | list[str],
        tokenizer: str = "",
        edit_batch: PositiveInt | None = None,
        skip: NonNegativeInt = 0,
        limit: PositiveInt | None = None,
        shuffle: int | None = None,
        split: str = "train",
        zsre_target: ZsreTarget = "answers",
        evaluation_batch: PositiveInt = 32,
        chat: Chat = False,
        join: Join = "auto",
        trust_remote_code: bool = False,
        stream: bool = False,
        stream_wait: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        if stream and (edit_batch is None or shuffle is not None):
            raise ValueError("--data.stream true needs --data.edit_batch, and its records cannot be shuffled")
        self.stream, self.stream_wait = stream, float(stream_wait)
        self.done = 0  # edits that the run had written before it was resumed
        self.path, self.split, self.zsre_target = path, split, zsre_target
        self.tokenizer_name, self.chat, self.join = tokenizer, chat, join
        self.trust_remote_code = trust_remote_code
        self.edit_batch = edit_batch
        self.skip, self.limit, self.shuffle = skip, limit, shuffle
        self.evaluation_batch = evaluation_batch
        self.edits: list[Edit] = []
        self._is_set_up = False
        self._given_edits: list[Edit] | None = None
        self._given_sizes: list[int] | None = None  # edits of each edit batch
        self._remaining: Iterator[Edit] | None = None  # of a stream, after the edits that are written
        self._tokenizer: Any = None

    @classmethod
    def of(cls, edits: Sequence[Edit], tokenizer: Any, **settings: Any) -> EditDataModule:
        """A data module of edits that are given as objects instead of in a file.

        Args:
            edits: The edits.
            tokenizer: As for :meth:`attach`.
            settings: The other arguments of the class.
        """
        data = cls(**{"path": "facts", **settings})
        data._given_edits = list(edits)
        data.attach(tokenizer)
        return data

    @classmethod
    def of_batches(cls, batches: Sequence[Sequence[Edit]], tokenizer: Any, **settings: Any) -> EditDataModule:
        """As :meth:`of`, with edit batches of any sizes."""
        data = cls.of([edit for batch in batches for edit in batch], tokenizer, **settings)
        data._given_sizes = [len(batch) for batch in batches]
        return data

    def attach(self, tokenizer: Any) -> None:
        """Use a tokenizer that is already loaded, instead of loading one."""
        self._tokenizer = tokenizer

    def setup(self, stage: str) -> None:
        """Read the edits and check each against the tokenizer.

        Raises:
            FileNotFoundError: If the file does not exist.
            RecordError: If a record is unusable; the message names it.
            ValueError: If the edits are a stream and the stage is not fit.
        """
        if self._is_set_up:
            return
        if self.stream and stage != "fit":
            raise ValueError("--data.stream true is for fit; to evaluate a file of records, leave it out")
        if self.stream:
            return
        if self._given_edits is None:
            edits = read_edits(self.path, shuffle=self.shuffle, **self._selection)
        else:
            edits = self._given_edits
        self._check_tokens(edits)
        self.edits, self._is_set_up = edits, True
        log.info("%d edits from %s", len(edits), self.path)

    def _check_tokens(self, edits: Sequence[Edit]) -> None:
        tokenizer = self._tokenizer
        if tokenizer is None:
            tokenizer = load_tokenizer(self.tokenizer_name, self.trust_remote_code)
        encoder = PromptEncoder.of(tokenizer, self.chat, self.join)
        for edit in edits:
            try:
                encoder.encode(edit.prompt, edit.subject, target=edit.target)
                for text in edit.evaluation_texts():
                    check_characters(text)
            except LocationError as error:
                raise RecordError(f"{edit.origin}: {error}") from error

    def train_dataloader(self) -> DataLoader[EditBatch]:
        """The edit batches, the same on every process."""
        if self._given_sizes is not None:
            bounds = [0, *accumulate(self._given_sizes)]
            parts = [(tuple(self.edits[a:b]), tuple(range(a, b))) for a, b in pairwise(bounds)]
            return DataLoader([EditBatch(*part) for part in parts], batch_size=None)  # type: ignore[arg-type]
        if self.stream:
            batches = EditBatches(self._streamed, self.edit_batch or 1, self.done, None, self._processes, self._check)
        else:
            remaining, count = self.edits[self.done :], len(self.edits)
            batches = EditBatches(lambda: iter(remaining), self.edit_batch or count, self.done, count)
        return DataLoader(batches, batch_size=None)

    def resume_after(self, written: Iterable[Mapping[str, Any]]) -> None:
        """Skip the edits that an earlier run has written: the first of these, which must be the same ones.

        Args:
            written: The earlier run's lines of the ledger.

        Raises:
            RecordError: If an edit differs from the one that was written; the message names the record and both.
        """
        name = self.path if isinstance(self.path, str) else ", ".join(self.path)
        if not self.stream:
            self.done = skip_written(iter(self.edits), written, name)
            return

        def skip() -> int:
            self._remaining = self._all_streamed()
            return skip_written(self._remaining, written, name)

        self.done = skip() if self._processes is None else self._processes.compute_object_on_rank_zero(skip)

    def _all_streamed(self) -> Iterator[Edit]:
        return stream_edits(self.path, wait=self.stream_wait, **self._selection)

    @property
    def _selection(self) -> dict[str, Any]:
        """Which records are read, and as what."""
        return {"split": self.split, "skip": self.skip, "limit": self.limit, "zsre_target": self.zsre_target}

    def _streamed(self) -> Iterator[Edit]:
        """The edits of a stream that are not written yet."""
        return self._all_streamed() if self._remaining is None else self._remaining

    def _check(self, batch: Sequence[Edit]) -> None:
        check_no_contradictions(batch)
        self._check_tokens(batch)

    def val_dataloader(self) -> DataLoader[EditBatch] | list[Any]:
        """All edits with their questions, for the scores before and after; each process gets its share."""
        if self.stream:
            return []
        share = (self._processes.rank, self._processes.size) if self._processes else (0, 1)
        return self._loader(BatchSampler(len(self.edits), self.evaluation_batch, *share))

    def test_dataloader(self) -> DataLoader[EditBatch] | list[Any]:
        """The same as :meth:`val_dataloader`."""
        return self.val_dataloader()

    @property
    def _processes(self) -> ProcessGroup | None:
        return ProcessGroup.of(self.trainer) if self.trainer else None

    def _loader(self, sampler: BatchSampler) -> DataLoader[EditBatch]:
        if not self._is_set_up:
            raise RuntimeError("EditDataModule.setup has not run; call it, or give the module to a Trainer")
        return DataLoader(list(enumerate(self.edits)), batch_sampler=sampler, collate_fn=_collate)  # type: ignore

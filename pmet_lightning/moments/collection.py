"""One pass over a corpus for the second moments of some projections: on all processes, and resumable.

The rows of the corpus are distributed over the processes block by block. The sums are reduced only when the moments
are evaluated, and every process saves its own from time to time, so that a killed run resumes where it was and ends
with the same numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pmet_lightning.data.corpus import CorpusError, corpus_name, pack_rows
from pmet_lightning.data.token_rows import TokenRow, by_token_budget
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.evaluation.sampled_corpus import general_texts
from pmet_lightning.model.architectures import ProjectionId, name_of
from pmet_lightning.moments.store import MomentError, MomentKey, MomentStore
from pmet_lightning.moments.sums import MomentSums
from pmet_lightning.solver.packed import pack_lower, symmetrize, unpack_lower, unpack_symmetric
from pmet_lightning.utils.distributed import ProcessGroup
from pmet_lightning.utils.progress import counter
from pmet_lightning.utils.tensor_files import save_tensors

log = logging.getLogger(__name__)

# Without a given number of texts: between 4 and 32 key vectors for each key dimension.
LEAST_KEYS, MOST_KEYS = 4, 32
# Rows distributed between two chances to save; the moments are evaluated after 2, 4, 8, … blocks.
BLOCK = 32


@dataclass(frozen=True)
class CollectionSettings:
    """What to read, and how much of it.

    Attributes:
        corpus: File or hub data set.
        subset: Subset of a hub data set.
        samples: Number of texts; ``None`` stops by itself.
        tolerance: Relative change with the last doubling of the text below which the pass stops by itself.
        length: Tokens in a row.
        seed: Seed of the order of the texts.
        save_every: Seconds between two saves.
    """

    corpus: str
    subset: str | None
    samples: int | None
    tolerance: float
    length: int
    seed: int
    save_every: float

    def described(self) -> str:
        """The settings in words, for a log line."""
        return f"{'enough' if self.samples is None else self.samples} texts of {self.corpus}"


class Collection:
    """The pass over the corpus.

    Args:
        settings: What to read.
        trainer: Its strategy reduces over the processes.
        module: The language model.
        projection_ids: The projections.
        store: Where the moments are stored, and the unfinished sums until then.
        key: What the moments depend on.
    """

    def __init__(
        self,
        settings: CollectionSettings,
        trainer: L.Trainer,
        module: EditableModel,
        projection_ids: Sequence[ProjectionId],
        store: MomentStore,
        key: MomentKey,
    ) -> None:
        self.settings, self.trainer, self.module, self.store, self.key = settings, trainer, module, store, key
        self.processes = ProcessGroup.of(trainer)
        self.sums = MomentSums(module.model, module.sites, projection_ids, module.encoder.pad_id, module.device)
        self.previous: dict[ProjectionId, Tensor] = {}  # the moments at the last evaluation
        width = max(len(total) for total in self.sums.lower.values())
        self.least, self.most = LEAST_KEYS * width, MOST_KEYS * width
        name = hashlib.sha256(repr(sorted(self.sums.lower)).encode()).hexdigest()[:12]
        self.unfinished = store.folder / f"unfinished-{name}"
        self.blocks_done = 0
        self.texts_read = 0

    def run(self) -> None:
        """Collect, reduce and store.

        Raises:
            CorpusError: If the corpus has no text.
        """
        self.resume()
        self._pass()
        self.previous.clear()
        tokens, text = self._tokens(), corpus_name(self.settings.corpus, self.settings.subset)
        if not tokens:
            raise CorpusError(f"the corpus {self.settings.corpus!r} has no text")
        for projection_id, total in self.sums.lower.items():
            moment = symmetrize(self.processes.all_reduce_sum(total)).div_(tokens)
            dead = int((moment.diagonal() == 0).sum())
            if dead:
                log.warning("%s in layer %d: %d of %d key dimensions are dead", *projection_id, dead, len(moment))
            if self.trainer.is_global_zero:
                self.store.save(projection_id, moment, tokens, self.key, self.module.model_name, text)
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        log.info("second moments over %d tokens", tokens)

    def _pass(self) -> None:
        """Add blocks, from the first that is missing, until the corpus ends or the moments no longer change."""
        last_save = time.monotonic()
        total = None if self.settings.samples else self.most
        with counter(self.trainer, total, "Second moments", "token") as bar:
            bar.update(self.sums.tokens * self.processes.size)
            for number, block in enumerate(self._blocks()):
                if number < self.blocks_done:
                    continue
                self._add(self.processes.shard(block))
                bar.update(sum(len(row.ids) for row in block))
                if self.settings.samples:  # their number of tokens is estimated as they are read
                    bar.total = round(bar.n * self.settings.samples / max(self.texts_read, 1))
                self.blocks_done = number + 1
                if number and self.blocks_done.bit_count() == 1 and self._check_convergence():
                    return
                due = time.monotonic() - last_save >= self.settings.save_every
                if self.trainer.strategy.broadcast(due):
                    self._save()
                    last_save = time.monotonic()

    def _blocks(self) -> Iterator[list[TokenRow]]:
        settings = self.settings
        texts = self._counted(general_texts(self.module, settings.corpus, settings.subset, settings.seed))
        encoder, texts = self.module.encoder, itertools.islice(texts, settings.samples)
        rows = pack_rows(texts, encoder.tokenizer, settings.length, encoder.rows)
        if settings.samples is None:
            rows = itertools.islice(rows, math.ceil(self.most / settings.length))
        while block := list(itertools.islice(rows, BLOCK)):
            yield block

    def _counted(self, texts: Iterator[str]) -> Iterator[str]:
        for text in texts:
            self.texts_read += 1
            yield text

    def _add(self, rows: Sequence[TokenRow]) -> None:
        for indices in by_token_budget([len(row.ids) for row in rows], self.module.tokens_per_batch):
            self.sums.add([rows[i] for i in indices])

    def _check_convergence(self) -> bool:
        """Compare the moments with those from half the text; returns whether they have converged."""
        tokens = self._tokens()
        changes = []
        for projection_id, total in self.sums.lower.items():
            moment = symmetrize(self.processes.all_reduce_sum(total)).div_(tokens)
            if projection_id in self.previous:
                change = _relative_change(self.previous.pop(projection_id), moment)  # freed before the next
                changes.append(change)
                log.info(
                    "second moments of %s in layer %d: %d tokens, doubling the text has changed them by %.1f %%",
                    *projection_id, tokens, 100 * change,
                )  # fmt: skip
            self.previous[projection_id] = moment.float()
        converged = len(changes) == len(self.sums.lower) and max(changes) <= self.settings.tolerance
        return self.settings.samples is None and tokens >= self.least and converged

    def _tokens(self) -> int:
        return int(self.processes.all_reduce_sum(torch.tensor(self.sums.tokens, device=self.module.device)))

    # ---- unfinished work -------------------------------------------------------------------------------

    def _path(self, block: int, rank: int) -> Path:
        return self.unfinished / f"{block:08d}-{rank}-of-{self.processes.size}.safetensors"

    def _own_files(self) -> dict[int, Path]:
        """Files that this process has saved, by the number of blocks done."""
        return {
            int(p.name[:8]): p
            for p in self.unfinished.glob(f"*-{self.processes.rank}-of-{self.processes.size}.safetensors")
        }

    def _save(self) -> None:
        """Save this process's sums; files of earlier saves are deleted once all processes have saved."""
        tensors = {}
        for projection_id, total in self.sums.lower.items():
            name = name_of(projection_id)
            tensors[f"sum-{name}"] = pack_lower(total.cpu())
            if projection_id in self.previous:
                tensors[f"previous-{name}"] = pack_lower(self.previous[projection_id].cpu())
        if self.processes.is_writer:
            path = self._path(self.blocks_done, self.processes.rank)
            save_tensors(path, tensors, {"tokens": str(self.sums.tokens)})
        self.trainer.strategy.barrier()
        for block, path in self._own_files().items():
            if block != self.blocks_done:
                path.unlink(missing_ok=True)

    def resume(self) -> None:
        """Resume after the last block that all processes have saved."""
        complete = [b for b in self._own_files() if all(self._path(b, r).is_file() for r in range(self.processes.size))]
        newest = self.trainer.strategy.broadcast(max(complete, default=0))
        if not newest:
            return
        path = self._path(newest, self.processes.rank)
        try:
            with safe_open(path, framework="pt") as file:
                for projection_id, total in self.sums.lower.items():
                    name = name_of(projection_id)
                    total.copy_(unpack_lower(file.get_tensor(f"sum-{name}"), len(total)))
                    if f"previous-{name}" in file.keys():  # noqa: SIM118
                        previous = file.get_tensor(f"previous-{name}")
                        self.previous[projection_id] = unpack_symmetric(previous.to(total.device), len(total))
                self.sums.tokens = int(file.metadata()["tokens"])
        except (SafetensorError, OSError, KeyError) as error:
            raise MomentError(f"{path}: unreadable unfinished sums ({error}); delete {self.unfinished}") from error
        self.blocks_done = newest
        log.info("resuming an unfinished collection after block %d", newest)


def _relative_change(before_II: Tensor, now_II: Tensor) -> float:
    """‖now − before‖ / ‖now‖, some rows at a time: there may be no memory for the whole difference."""
    rows = zip(before_II.split(512), now_II.split(512), strict=True)
    square = sum(float((now - before).square().sum()) for before, now in rows)
    return math.sqrt(square) / float(now_II.norm())

"""Work dealt out to the processes of a run, and what they found put together again.

Item i of the work belongs to process i modulo their number, so that no process has more than one place more.

Where the model is sharded, a pass takes all processes, so that all of them do all of the work, in step: they are then
one member of the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor

Item = TypeVar("Item")


def sums_are_less(count: int, keys_nI: Tensor, wanted_nO: Tensor) -> bool:
    """Whether K Kᵀ and E Kᵀ, in float64, are fewer bytes to put together than the keys and residuals of all edits.

    Args:
        count: N, the edits of all processes.
        keys_nI: Keys of one process, for their width and precision.
        wanted_nO: Its residuals, likewise.
    """
    return travelling_bytes(count, keys_nI, wanted_nO, sums=True) < travelling_bytes(count, keys_nI, wanted_nO, False)


def travelling_bytes(count: int, keys_nI: Tensor, wanted_nO: Tensor, sums: bool) -> int:
    """Bytes of N keys and residuals, N · (I + O) numbers, or of their sums, I · (I + O) numbers of eight bytes.

    Args:
        count: N.
        keys_nI: As for :func:`sums_are_less`.
        wanted_nO: As for :func:`sums_are_less`.
        sums: Which of the two.
    """
    in_width, out_width = keys_nI.shape[1], wanted_nO.shape[1]
    if sums:
        return 8 * in_width * (in_width + out_width)
    return count * (in_width * keys_nI.element_size() + out_width * wanted_nO.element_size())


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, as one of them sees it.

    Attributes:
        strategy: Lightning's, which talks to the others.
        rank: Number of this process, or of the member of the processes that it is part of.
        size: How many there are.
        sharded: Whether all processes are one member, which must not come to different decisions.
    """

    strategy: Strategy
    rank: int
    size: int
    sharded: bool = False

    @classmethod
    def of(cls, trainer: L.Trainer) -> ProcessGroup:
        """The processes of a trainer."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            return cls(trainer.strategy, 0, 1, sharded=True)
        return cls(trainer.strategy, trainer.global_rank, trainer.world_size)

    @property
    def is_writer(self) -> bool:
        """Whether this process stores what its member of the processes has found."""
        return not self.sharded or self.strategy.is_global_zero

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process makes what :meth:`compute_on_rank_zero` hands to all."""
        return self.strategy.is_global_zero

    def broadcast_if_sharded(self, own: Item) -> Item:
        """What this process has found, or, where all are in step, what the first one has."""
        return self.strategy.broadcast(own) if self.sharded else own

    def all_reduce_min(self, own: int) -> int:
        """The smallest of the numbers that the processes have found, on every process."""
        number = torch.tensor(own, device=self.strategy.root_device)
        return int(self.strategy.reduce(number, reduce_op="min"))  # type: ignore[arg-type]

    def shard(self, work: Sequence[Item]) -> list[Item]:
        """What of the work is this process'."""
        return list(work[self.rank :: self.size])

    def all_gather(self, own: Tensor, count: int) -> Tensor:
        """The rows of all ``count`` places in order, from those of each process' own; on every process."""
        if self.size == 1:
            return own
        most = -(-count // self.size)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        everyone = self.strategy.all_gather(padded.contiguous())
        return everyone.transpose(0, 1).flatten(0, 1)[:count].contiguous()

    def all_gather_objects(self, own: Sequence[Item], count: int) -> list[Item]:
        """As :meth:`all_gather`, for what is no tensor."""
        parts = [self.strategy.broadcast(list(own), src=rank) for rank in range(self.size)]
        return [parts[place % self.size][place // self.size] for place in range(count)]

    def all_reduce_sum(self, own: Tensor) -> Tensor:
        """The sum over the processes, on every process; a new tensor."""
        if self.size == 1:
            return own.clone()
        summed: Tensor = self.strategy.reduce(own.clone(), reduce_op="sum")  # type: ignore[assignment]
        return summed

    def compute_on_rank_zero(self, make: Callable[[], tuple[Tensor, Item]], empty: Tensor) -> tuple[Tensor, Item]:
        """What the first process makes, bit by bit, on every process.

        Args:
            make: Gives a tensor and something else; only the first process calls it.
            empty: A tensor of the same shape, dtype and device.

        Raises:
            Exception: What ``make`` raised, on every process: none is left waiting for the others.
        """
        kept: list[Tensor] = []

        def make_and_keep() -> Item:
            tensor, rest = make()
            kept.append(tensor)
            return rest

        rest = self.compute_object_on_rank_zero(make_and_keep)
        # What is zero everywhere else arrives as it is.
        tensor = kept[0] if kept else torch.zeros_like(empty)
        return self.strategy.reduce(tensor, reduce_op="sum"), rest  # type: ignore[return-value]

    def compute_object_on_rank_zero(self, make: Callable[[], Item]) -> Item:
        """As :meth:`compute_on_rank_zero`, for what is no tensor."""
        made: Item | None = None
        error: Exception | None = None
        if self.is_rank_zero:
            try:
                made = make()
            except Exception as problem:
                error = problem
        made, error = self.strategy.broadcast((made, error))
        if error is not None:
            raise error
        return made  # type: ignore[return-value]

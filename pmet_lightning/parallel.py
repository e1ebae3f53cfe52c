"""Work dealt out to the processes of a run, and what they found put together again.

Place i of the work belongs to process i modulo their number, so that no process has more than one place more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class Team:
    """The processes of a run, as one of them sees it.

    Attributes:
        strategy: Lightning's, which talks to the others.
        rank: Number of this process.
        size: How many there are.
    """

    strategy: Strategy
    rank: int
    size: int

    @classmethod
    def of(cls, trainer: L.Trainer) -> Team:
        """The processes of a trainer."""
        return cls(trainer.strategy, trainer.global_rank, trainer.world_size)

    def own(self, work: Sequence[Item]) -> list[Item]:
        """What of the work is this process'."""
        return list(work[self.rank :: self.size])

    def gathered(self, own: Tensor, count: int) -> Tensor:
        """The rows of all ``count`` places in order, from those of each process' own; on every process."""
        if self.size == 1:
            return own
        most = -(-count // self.size)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        everyone = self.strategy.all_gather(padded.contiguous())
        return everyone.transpose(0, 1).flatten(0, 1)[:count].contiguous()

    def gathered_objects(self, own: Sequence[Item], count: int) -> list[Item]:
        """As :meth:`gathered`, for what is no tensor."""
        parts = [self.strategy.broadcast(list(own), src=rank) for rank in range(self.size)]
        return [parts[place % self.size][place // self.size] for place in range(count)]

    def total(self, own: Tensor) -> Tensor:
        """The sum over the processes, on every process."""
        if self.size == 1:
            return own
        summed: Tensor = self.strategy.reduce(own.clone(), reduce_op="sum")  # type: ignore[assignment]
        return summed

    def from_first(self, make: Callable[[], tuple[Tensor, Item]], empty: Tensor) -> tuple[Tensor, Item]:
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

        rest = self.object_from_first(make_and_keep)
        # What is zero everywhere else arrives as it is.
        return self.total(kept[0] if kept else torch.zeros_like(empty)), rest

    def object_from_first(self, make: Callable[[], Item]) -> Item:
        """As :meth:`from_first`, for what is no tensor."""
        made: Item | None = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                made = make()
            except Exception as problem:
                error = problem
        made, error = self.strategy.broadcast((made, error))
        if error is not None:
            raise error
        return made  # type: ignore[return-value]

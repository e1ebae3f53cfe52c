"""Work distributed over the processes of a run, and their results gathered.

Item i of the work belongs to process i modulo the number of processes, so that no two differ by more than one item.

Where the model is sharded, a forward pass involves all processes, so that all of them do all of the work in lockstep:
they then count as a single member of the group.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor

Item = TypeVar("Item")

# A process may end half a millisecond after its last collective; its threads need less, but also a core.
_LETTING_GO_SECONDS = 0.5


def leave_process_group_at_exit() -> None:
    """Destroy the process group before the interpreter goes, and let its threads finish.

    A thread of gloo lets go of the tensors of a collective after the process has gone on, and where it asks for the
    interpreter then and Python ends, the process is aborted. Destroying a group waits for its threads only where
    nothing else holds the group: torch's caches of DTensor do, in a sharded run. Lightning destroys only groups of
    NCCL.
    """
    atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(_LETTING_GO_SECONDS)  # without the interpreter's lock


def sums_are_less(count: int, keys_nI: Tensor, wanted_nO: Tensor) -> bool:
    """Whether K Kᵀ and E Kᵀ, in float64, are fewer bytes to send than the keys and residuals of all edits.

    Args:
        count: N, the edits of all processes.
        keys_nI: Keys of one process; only their width and dtype matter.
        wanted_nO: Residuals of one process; likewise.
    """
    return travelling_bytes(count, keys_nI, wanted_nO, sums=True) < travelling_bytes(count, keys_nI, wanted_nO, False)


def travelling_bytes(count: int, keys_nI: Tensor, wanted_nO: Tensor, sums: bool) -> int:
    """Bytes of N keys and residuals, N · (I + O) numbers, or of their sums, I · (I + O) numbers of eight bytes.

    Args:
        count: N.
        keys_nI: As for :func:`sums_are_less`.
        wanted_nO: As for :func:`sums_are_less`.
        sums: Whether the sums are sent, or the keys and residuals.
    """
    in_width, out_width = keys_nI.shape[1], wanted_nO.shape[1]
    if sums:
        return 8 * in_width * (in_width + out_width)
    return count * (in_width * keys_nI.element_size() + out_width * wanted_nO.element_size())


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, as one of them sees them.

    Attributes:
        strategy: Lightning's strategy, which communicates with the other processes.
        rank: Rank of this process, or of the member of the group that it is part of.
        size: Number of members.
        sharded: Whether all processes are one member (of a sharded model), so that they must not take different
            decisions.
    """

    strategy: Strategy
    rank: int
    size: int
    sharded: bool = False

    @classmethod
    def of(cls, trainer: L.Trainer) -> ProcessGroup:
        """The process group of a trainer."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            return cls(trainer.strategy, 0, 1, sharded=True)
        return cls(trainer.strategy, trainer.global_rank, trainer.world_size)

    @property
    def is_writer(self) -> bool:
        """Whether this process stores the results of its member of the group."""
        return not self.sharded or self.strategy.is_global_zero

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process computes what :meth:`compute_on_rank_zero` gives to all."""
        return self.strategy.is_global_zero

    def broadcast_if_sharded(self, own: Item) -> Item:
        """The value of this process or, where all run in lockstep, that of rank zero."""
        return self.strategy.broadcast(own) if self.sharded else own

    def all_reduce_min(self, own: int) -> int:
        """The minimum over the processes, on every process."""
        number = torch.tensor(own, device=self.strategy.root_device)
        return int(self.strategy.reduce(number, reduce_op="min"))  # type: ignore[arg-type]

    def owns(self, index: int) -> bool:
        """Whether the item with this index belongs to this process."""
        return index % self.size == self.rank

    def shard(self, work: Sequence[Item]) -> list[Item]:
        """The items of the work that belong to this process."""
        return list(work[self.rank :: self.size])

    def all_gather(self, own: Tensor, count: int) -> Tensor:
        """The rows of all ``count`` items in order, gathered from the rows of each process; on every process."""
        if self.size == 1:
            return own
        most = -(-count // self.size)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        gathered = self.strategy.all_gather(padded.contiguous())
        return gathered.transpose(0, 1).flatten(0, 1)[:count].contiguous()

    def all_gather_objects(self, own: Sequence[Item], count: int) -> list[Item]:
        """As :meth:`all_gather`, for objects that are not tensors."""
        parts = [self.strategy.broadcast(list(own), src=rank) for rank in range(self.size)]
        return [parts[index % self.size][index // self.size] for index in range(count)]

    def all_gather_lists(self, own: Sequence[Item]) -> list[Item]:
        """The items of all processes, however many each has, those of the first process first; on every process."""
        if self.size == 1:
            return list(own)
        return [item for rank in range(self.size) for item in self.strategy.broadcast(list(own), src=rank)]

    def all_reduce_sum(self, own: Tensor) -> Tensor:
        """The sum over the processes, on every process; a new tensor."""
        if self.size == 1:
            return own.clone()
        summed: Tensor = self.strategy.reduce(own.clone(), reduce_op="sum")  # type: ignore[assignment]
        return summed

    def compute_on_rank_zero(
        self, make: Callable[[], tuple[Sequence[Tensor], Item]], device: torch.device
    ) -> tuple[list[Tensor], Item]:
        """What rank zero computes, bit for bit, on every process.

        Args:
            make: Returns tensors on the device and any other object; called on rank zero only.
            device: Where the tensors are on the other processes.

        Raises:
            Exception: What ``make`` raised, on every process, so that none is left waiting.
        """
        kept: list[Tensor] = []

        def make_and_keep() -> tuple[list[tuple[torch.Size, torch.dtype]], Item]:
            tensors, rest = make()
            # Processes exchange memory as it lies, and on the others it lies row by row.
            kept.extend(tensor.contiguous() for tensor in tensors)
            return [(tensor.shape, tensor.dtype) for tensor in kept], rest

        described, rest = self.compute_object_on_rank_zero(make_and_keep)
        # The sum with the zeros of every other process is the tensor itself.
        own = kept or [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in described]
        return [self.strategy.reduce(tensor, reduce_op="sum") for tensor in own], rest  # type: ignore[misc]

    def compute_object_on_rank_zero(self, make: Callable[[], Item]) -> Item:
        """As :meth:`compute_on_rank_zero`, for an object that is not a tensor."""
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

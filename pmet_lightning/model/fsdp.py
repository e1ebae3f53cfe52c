"""A frozen model that is spread over the devices of several processes (FSDP2): all that differs from a whole one.

Each process holds some rows of every weight. A layer's weights are put together when the layer runs, and are gone again
after it; so all processes must run the same passes (see :class:`~pmet_lightning.utils.distributed.ProcessGroup`). The
functions below take whole weights too, and then do nothing special.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.strategies import Strategy
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def prepare_strategy(strategy: Strategy, processes: int) -> None:
    """Let a strategy whose sizes are left to it shard the model over all processes, and refuse what cannot be used.

    Lightning's own choice for ModelParallelStrategy is to split single weights' products within a node.

    Args:
        strategy: Lightning's, before its processes have met.
        processes: How many there will be, on all nodes.

    Raises:
        ValueError: If it is the older FSDPStrategy.
    """
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "--trainer.strategy is Lightning's FSDPStrategy, expected ddp or, for a model larger than a device, "
            "lightning.pytorch.strategies.ModelParallelStrategy (see multi-gpu.yaml)"
        )
    if isinstance(strategy, ModelParallelStrategy):
        if strategy._tensor_parallel_size == "auto":
            strategy._tensor_parallel_size = 1
        if strategy._data_parallel_size == "auto":
            strategy._data_parallel_size = processes // int(strategy._tensor_parallel_size)


def shard(model: nn.Module, layers: str, mesh: DeviceMesh) -> None:
    """Keep of a causal language model this process' rows of every weight only.

    Args:
        model: The whole language model, the same on every process; embeddings that share their weight with the
            vocabulary head no longer do.
        layers: Path of the list of its layers, each of which is put together by itself; so are what else is in the
            module that holds them, and the vocabulary head. Anything else, such as a vision tower, stays whole.
        mesh: Lightning's, of ModelParallelStrategy.

    Raises:
        ValueError: If the strategy is to split single weights' products too.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"the strategy's tensor_parallel_size is {mesh['tensor_parallel'].size()}, expected 1 (and "
            "data_parallel_size the number of processes): the model is sharded, its layers are not split"
        )
    head, holder = model.get_output_embeddings(), model.get_submodule(layers.rpartition(".")[0])  # type: ignore[operator]
    if head.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    # Holder and head are roots of their own, since passes for the sake of hooks run no head.
    for module in (*model.get_submodule(layers).children(), holder, head):
        fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=True)


@contextmanager
def load_in_turn(module: L.LightningModule) -> Iterator[None]:
    """Let the processes of a host load what they shard one after another: it is there whole once, not many times."""
    if module.device_mesh is None:
        yield
        return
    strategy: Any = module.trainer.strategy
    for _ in range(strategy.local_rank):
        strategy.barrier()
    try:
        yield
    finally:
        for _ in range(strategy.local_rank, strategy.num_processes):
            strategy.barrier()


@contextmanager
def reshard_on_exit(model: nn.Module) -> Iterator[None]:
    """Leave no weight put together, even where a pass inside ends early and the layers' hooks do not run."""
    from torch.distributed.fsdp import FSDPModule

    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_rows(weight: Tensor) -> Tensor:
    """This process' rows of a weight, not a copy."""
    rows: Tensor = weight.to_local() if _is_sharded(weight) else weight
    return rows.detach()


def first_local_row(weight: Tensor) -> int:
    """Which row of the weight :func:`local_rows` begin with."""
    if not _is_sharded(weight):
        return 0
    assert weight.placements[0].is_shard(0), weight.placements
    rows = -(-weight.shape[0] // weight.device_mesh.size())
    return min(weight.device_mesh.get_local_rank() * rows, weight.shape[0])


def local_part(weight: Tensor, matrix: Tensor) -> Tensor:
    """Those rows of a matrix of the weight's shape that belong to :func:`local_rows`, on their device."""
    own = local_rows(weight)
    return matrix.narrow(0, first_local_row(weight), len(own)).to(own.device)


def sum_over_shards(weight: Tensor, values: Tensor) -> Tensor:
    """The sum, over the processes that hold a weight, of what each has found in its own rows."""
    if not _is_sharded(weight):
        return values
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(values, weight.device_mesh, [Partial()]).full_tensor()


def weight_norm(weight: Tensor, dtype: torch.dtype) -> float:
    """‖W‖, computed in a precision."""
    return float(sum_over_shards(weight, local_rows(weight).to(dtype).square().sum()).sqrt())


def is_finite(weight: Tensor) -> bool:
    """Whether every entry is, on every process."""
    return int(sum_over_shards(weight, (~local_rows(weight).isfinite()).sum())) == 0


def unshard(module: nn.Module, device: torch.device) -> nn.Module:
    """A small module, such as a norm, to be run by itself: as it is, or a copy whose weights are whole and there."""
    weights = {name: p.full_tensor() if _is_sharded(p) else p for name, p in module.named_parameters()}
    if all(weights[name] is p and p.device == device for name, p in module.named_parameters()):
        return module
    twin = copy.copy(module)
    twin._parameters = {n: nn.Parameter(w.detach().to(device), requires_grad=False) for n, w in weights.items()}
    return twin

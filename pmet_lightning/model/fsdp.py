"""A frozen model that is sharded over the devices of several processes (FSDP2): all that differs from a whole one.

Each process holds some rows of every weight. A layer's weights are gathered when the layer runs, and freed after it; so
all processes must run the same passes (see :class:`~pmet_lightning.utils.distributed.ProcessGroup`). The functions
below accept whole weights too, and then do nothing special.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from pmet_lightning.model.quantized_base import quantization_of

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.strategies import Strategy
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def prepare_strategy(strategy: Strategy, processes: int) -> None:
    """Let a strategy with automatic sizes shard the model over all processes, and refuse one that cannot be used.

    Lightning's own default for ModelParallelStrategy is tensor parallelism within a node.

    Args:
        strategy: Lightning's strategy, before its processes are connected.
        processes: Their number, on all nodes.

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
    """Keep only this process's rows of every weight of a causal language model.

    Args:
        model: The whole language model, the same on every process; embeddings that are tied to the vocabulary head are
            untied.
        layers: Path of the list of its layers, each of which is gathered by itself; so are the other contents of the
            module that holds them, and the vocabulary head. Anything else, such as a vision tower, stays whole.
        mesh: The device mesh of Lightning's ModelParallelStrategy.

    Raises:
        ValueError: If the model is quantised, or the strategy is set to tensor parallelism too.
    """
    from torch.distributed.fsdp import fully_shard

    quantization = quantization_of(model)
    if quantization is not None:
        raise ValueError(
            f"the model is quantised ({quantization}), and a sharded model must not be; expected one process, which "
            "--model.device_map auto spreads over several devices"
        )

    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"the strategy's tensor_parallel_size is {mesh['tensor_parallel'].size()}, expected 1 (and "
            "data_parallel_size the number of processes): the model is sharded, its layers are not split"
        )
    head, holder = model.get_output_embeddings(), model.get_submodule(layers.rpartition(".")[0])  # type: ignore[operator]
    if head.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    # Holder and head are separate roots, since passes that are run for their hooks run no head.
    for module in (*model.get_submodule(layers).children(), holder, head):
        fully_shard(module, mesh=mesh["data_parallel"], reshard_after_forward=True)


@contextmanager
def load_in_turn(module: L.LightningModule) -> Iterator[None]:
    """Let the processes of a host load and shard the model in turn, so that only one whole copy exists at a time."""
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
    """Leave no weight gathered, even where a pass inside ends early and the layers' hooks do not run."""
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
    """This process's rows of a weight, not a copy."""
    rows: Tensor = weight.to_local() if _is_sharded(weight) else weight
    return rows.detach()


def first_local_row(weight: Tensor) -> int:
    """Index in the weight of the first of :func:`local_rows`."""
    if not _is_sharded(weight):
        return 0
    assert weight.placements[0].is_shard(0), weight.placements
    rows = -(-weight.shape[0] // weight.device_mesh.size())
    return min(weight.device_mesh.get_local_rank() * rows, weight.shape[0])


def local_part(weight: Tensor, matrix: Tensor) -> Tensor:
    """Those rows of a matrix of the weight's shape that belong to :func:`local_rows`, on their device."""
    rows = local_rows(weight)
    return matrix.narrow(0, first_local_row(weight), len(rows)).to(rows.device)


def sum_over_shards(weight: Tensor, values: Tensor) -> Tensor:
    """The sum, over the processes that hold a weight, of what each has computed from its own rows."""
    if not _is_sharded(weight):
        return values
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(values, weight.device_mesh, [Partial()]).full_tensor()


def whole_weight(weight: Tensor) -> Tensor:
    """All rows of a weight, gathered from the processes that hold it."""
    whole: Tensor = weight.full_tensor() if _is_sharded(weight) else weight
    return whole.detach()


def weight_norm(weight: Tensor, dtype: torch.dtype) -> float:
    """‖W‖, computed in a dtype."""
    return float(sum_over_shards(weight, local_rows(weight).to(dtype).square().sum()).sqrt())


def is_finite(weight: Tensor) -> bool:
    """Whether every entry of a weight is finite, on all processes."""
    return int(sum_over_shards(weight, (~local_rows(weight).isfinite()).sum())) == 0


def unshard(module: nn.Module, device: torch.device) -> nn.Module:
    """A small module, such as a norm, to run by itself: unchanged, or a copy with whole weights on the device."""
    weights = {name: p.full_tensor() if _is_sharded(p) else p for name, p in module.named_parameters()}
    if all(weights[name] is p and p.device == device for name, p in module.named_parameters()):
        return module
    whole = copy.copy(module)
    whole._parameters = {n: nn.Parameter(w.detach().to(device), requires_grad=False) for n, w in weights.items()}
    return whole

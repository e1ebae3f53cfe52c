"""Context managers that record or add vectors at a module while a model runs, and remove their hooks on exit.

In a model on several devices, a module may be on another device than the rows.

Legend: R = rows, T = tokens, N = some tokens, F = features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _Exit(Exception):
    """Leaves a forward pass whose remaining layers are not needed."""


class Recording:
    """What a hook recorded in the last forward pass: ``values``, shape [R, F] or [R, T, F]."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def take(self) -> Tensor:
        """The recorded values.

        Raises:
            RuntimeError: If the module did not run.
        """
        if self.values is None:
            raise RuntimeError("the recorded module did not run in this forward pass")
        return self.values


def _by_row(tensor: Tensor, columns_R: Tensor) -> Tensor:
    """The tensor as [R, T, F]; some families (OPT) flatten rows and tokens around their FFN."""
    return tensor if tensor.dim() == 3 else tensor.unflatten(0, (len(columns_R), -1))


def _at(tensor: Tensor, columns_R: Tensor) -> Tensor:
    rows = torch.arange(len(columns_R), device=tensor.device)
    return _by_row(tensor, columns_R)[rows, columns_R.to(tensor.device)]


@contextmanager
def record_input(module: nn.Module, columns_R: Tensor) -> Iterator[Recording]:
    """Record the module's input (a key) at one column of each row."""
    recording = Recording()

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        recording.values = _at(inputs[0], columns_R)

    handle = module.register_forward_pre_hook(hook)
    try:
        yield recording
    finally:
        handle.remove()


@contextmanager
def record_and_add(module: nn.Module, columns_R: Tensor, added_RF: Tensor | None = None) -> Iterator[Recording]:
    """Record the module's output at one column of each row, and add a vector to it there.

    Args:
        module: A projection, or a layer, which may return a tuple with its output first.
        columns_R: int64, shape [R].
        added_RF: Vectors to add after recording, shape [R, F]; gradients flow to them.
    """
    recording = Recording()

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        recording.values = _at(whole, columns_R)
        if added_RF is None:
            return None
        rows, columns = torch.arange(len(columns_R), device=whole.device), columns_R.to(whole.device)
        changed = _by_row(whole, columns_R).index_put((rows, columns), added_RF.to(whole), accumulate=True)
        changed = changed.view_as(whole)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield recording
    finally:
        handle.remove()


@contextmanager
def record_whole(module: nn.Module, rows: int, *, output: bool = True) -> Iterator[Recording]:
    """Record a module's output, or its input, at all columns of each row: values of shape [R, T, F].

    Args:
        module: A projection, or a layer, which may return a tuple with its output first.
        rows: R.
        output: Whether to record the output, or the input.
    """
    recording = Recording()

    def keep(value: Any) -> None:
        whole = value[0] if isinstance(value, tuple) else value
        whole = whole.clone()  # Falcon modifies it in place
        recording.values = whole if whole.dim() == 3 else whole.unflatten(0, (rows, -1))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, __: tuple[Any, ...], given: Any) -> None:
        keep(given)

    if output:
        handle = module.register_forward_hook(after)
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield recording
    finally:
        handle.remove()


@contextmanager
def replace_output(module: nn.Module, shape: tuple[int, int], positions_N: Tensor, values_NF: Tensor) -> Iterator[None]:
    """Replace a module's output at some tokens.

    Args:
        module: A projection, or a layer, which may return a tuple with its output first.
        shape: R and T.
        positions_N: int64, counted over all tokens of all rows.
        values_NF: Its output there.
    """

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        flat = whole.reshape(shape[0] * shape[1], -1)
        changed = flat.index_copy(0, positions_N.to(whole.device), values_NF.to(whole)).view_as(whole)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def narrow_input(module: nn.Module, positions: Tensor) -> Iterator[None]:
    """Run a module, such as the vocabulary head, on some tokens instead of all of them.

    Unlike with ``logits_to_keep`` of transformers, they may differ from row to row.

    Args:
        module: Takes [R, T, F].
        positions: int64, counted over all tokens of all rows, of any shape; the module then gets [..., F].
    """

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].flatten(0, 1)[positions.to(inputs[0].device)], *inputs[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def run_at(
    module: nn.Module, positions_N: Tensor, shape: tuple[int, int], elsewhere: Tensor | None = None
) -> Iterator[None]:
    """Run a module that maps each token independently, such as an FFN, at some tokens only.

    Args:
        module: Takes and returns [R, T, F], or [R·T, F] as in OPT; inputs of any other shape are run in full.
        positions_N: int64, counted over all tokens of all rows; no duplicates.
        shape: R and T.
        elsewhere: Its output at the other tokens, shape [R, T, F]; zeros where ``None``.
    """

    count = shape[0] * shape[1]
    outer: list[tuple[int, ...]] = []  # leading dimensions of the input in the current pass

    def narrow(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (hidden,) = (*args, *kwargs.values())
        if hidden.shape[:-1] not in (shape, (count,)):
            return None
        outer.append(hidden.shape[:-1])
        taken = hidden.reshape(count, -1).index_select(0, positions_N.to(hidden.device))
        return (taken.unsqueeze(0) if hidden.dim() == 3 else taken,), {}

    def widen(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        if not outer:
            return output
        if elsewhere is None:
            whole = output.new_zeros(count, output.shape[-1])
        else:
            whole = elsewhere.flatten(0, 1).to(output, copy=True)
        whole.index_copy_(0, positions_N.to(whole.device), output.flatten(0, -2))
        return whole.unflatten(0, outer.pop())

    handles = [module.register_forward_pre_hook(narrow, with_kwargs=True), module.register_forward_hook(widen)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stop_after(module: nn.Module) -> Iterator[None]:
    """End the forward pass that runs inside as soon as the module has computed its output."""

    def hook(*_: Any) -> None:
        raise _Exit

    with _until_exit(module.register_forward_hook(hook)):
        yield


@contextmanager
def stop_before(
    module: nn.Module, look: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """End the forward pass that runs inside just before the module, after a call of ``look`` with its arguments."""

    def hook(*given: Any) -> None:
        look(*given)
        raise _Exit

    with _until_exit(module.register_forward_pre_hook(hook, with_kwargs=True)):
        yield


@contextmanager
def _until_exit(handle: RemovableHandle) -> Iterator[None]:
    """Catch the exit that a hook raises, and remove the hook."""
    try:
        yield
    except _Exit:
        pass
    finally:
        handle.remove()

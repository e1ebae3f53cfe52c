"""What never changes while deltas are optimised is computed once: tokens before a delta, and layers below it.

A delta sits in layer L at the subject's last token. Causal attention lets no earlier token see it, so their keys and
values are kept; no lower layer sees it, so the hidden states that enter layer L are kept.
Legend: R = rows, P = tokens kept, S = tokens run, F = model width.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.language_model import run_to
from pmet_lightning.sites import stop_before
from pmet_lightning.tokens import RowBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the tokens before the ones that are run.

    Attributes:
        cache: A Hugging Face cache, never handed out itself: a forward pass writes into what it gets.
        mask_RP: int64, 1 for real tokens, which stand at the end.
    """

    cache: Any
    mask_RP: Tensor

    def fresh(self) -> Any:
        """A cache for one forward pass; it shares the tensors, which are replaced and not written into."""
        return self._with_layers([copy.copy(layer) for layer in self.cache.layers])

    def select(self, rows: Tensor) -> Prefix:
        """The given rows (a boolean mask, shape [R], or an index)."""
        layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in layers:
            own = rows.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[own], layer.values[own]
        return Prefix(self._with_layers(layers), self.mask_RP[rows])

    def repeated(self, count: int) -> Prefix:
        """The only row, so many times, without a copy of it."""
        layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in layers:
            layer.keys, layer.values = (t.expand(count, -1, -1, -1) for t in (layer.keys, layer.values))
        return Prefix(self._with_layers(layers), self.mask_RP.expand(count, -1))

    def join(self, other: Prefix) -> Prefix:
        """These rows, then the other's; the shorter ones get empty columns in front."""
        width = max(self.mask_RP.shape[1], other.mask_RP.shape[1])
        layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer, more in zip(layers, other.cache.layers, strict=True):
            # A sliding window keeps no more than it lets a token look back.
            window = getattr(layer, "sliding_window", None)
            count = width if window is None else min(width, window - 1)
            for name in ("keys", "values"):
                both = [_grown(getattr(one, name), count, dim=-2) for one in (layer, more)]
                setattr(layer, name, torch.cat(both))
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = width
        masks = [_grown(one.mask_RP, width, dim=-1) for one in (self, other)]
        return Prefix(self._with_layers(layers), torch.cat(masks))

    def _with_layers(self, layers: list[Any]) -> Any:
        cache = copy.copy(self.cache)
        cache.layers = layers
        return cache


def _grown(tensor: Tensor, count: int, dim: int) -> Tensor:
    """The last ``count`` columns, zeros in front where there are not so many."""
    lacking = count - tensor.shape[dim]
    if lacking <= 0:
        return tensor.narrow(dim, -lacking, count)
    shape = list(tensor.shape)
    shape[dim] = lacking
    return torch.cat([tensor.new_zeros(shape), tensor], dim)


def split_at_subject(model: nn.Module, rows: RowBatch) -> tuple[Prefix | None, RowBatch]:
    """Run the tokens before each row's subject's last token once; the rest remains to be run.

    Args:
        model: The language model.
        rows: Padded on either side.

    Returns:
        The prefix and rows of the remaining tokens, all of which begin at the subject's last token; or ``None`` and
        the rows as they are, where the model keeps no plain keys and values.
    """
    columns = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
    real = rows.attention_mask.bool()
    first = torch.where(real, columns, len(columns)).amin(dim=1)
    last = torch.where(real, columns, -1).amax(dim=1)
    # One column at least, if of padding alone: then every prefix of a model is one, and two can be joined.
    most = max(int((rows.subject - first).max()), 1)
    heads = _columns(rows, first.unsqueeze(1) + columns[:most], first, rows.subject - 1)
    # Rows that begin alike, such as with one context, share what is run.
    known = torch.where(heads.attention_mask.bool(), heads.input_ids, -1)
    unique, place = known.unique(dim=0, return_inverse=True)
    index = torch.zeros(len(unique), dtype=torch.long, device=place.device)
    index[place] = torch.arange(len(place), device=place.device)
    prefix = prefix_of(model, _rows(heads, index))
    if prefix is None:
        return None, rows
    count = int((last - rows.subject).max()) + 1
    tail = _columns(rows, rows.subject.unsqueeze(1) + columns[:count], first, last)
    shifted = rows.label_columns - rows.subject.unsqueeze(1)
    return prefix.select(place), replace(tail, subject=torch.zeros_like(rows.subject), label_columns=shifted)


def prefix_of(model: nn.Module, head: RowBatch) -> Prefix | None:
    """The prefix that some rows are, once and for all.

    Args:
        model: The language model.
        head: Rows padded on the right; a row may be empty.

    Returns:
        ``None`` where the model keeps no plain keys and values.
    """
    # What stands before padding does not see it, whatever a family makes of a position that may look at nothing. But a
    # sliding window would keep the padding and lose tokens: such rows begin with it.
    cache = _run(model, head)
    if cache is None:
        return None
    count = head.input_ids.shape[1]
    lengths = head.attention_mask.sum(dim=1)
    wanted = torch.arange(count, device=lengths.device) - (count - lengths).unsqueeze(1)
    at_end = _columns(head, wanted, torch.zeros_like(lengths), lengths - 1)
    if all(layer.keys.shape[-2] == count for layer in cache.layers):
        return Prefix(_moved_to_the_end(cache, at_end.attention_mask), at_end.attention_mask)
    return Prefix(_run(model, at_end), at_end.attention_mask)


def _rows(rows: RowBatch, index: Tensor) -> RowBatch:
    """Some rows, with all of their columns."""
    return RowBatch(**{name: value[index] for name, value in vars(rows).items()})


def _columns(rows: RowBatch, wanted_RC: Tensor, first_R: Tensor, last_R: Tensor) -> RowBatch:
    """Some columns of each row; those beyond its real tokens are padding."""
    real = (wanted_RC >= first_R.unsqueeze(1)) & (wanted_RC <= last_R.unsqueeze(1))
    index = wanted_RC.clamp(0, rows.input_ids.shape[1] - 1)
    taken = {name: getattr(rows, name).gather(1, index) for name in ("input_ids", "position_ids")}
    return replace(rows, **taken, attention_mask=real.long())


@torch.no_grad()
def _run(model: nn.Module, head: RowBatch) -> Any:
    """The cache of some rows; ``None`` if it is of another kind."""
    body: nn.Module = model.base_model  # type: ignore[assignment]
    known = inspect.signature(body.forward).parameters
    if "past_key_values" not in known:
        return None
    inputs: dict[str, Any] = {"input_ids": head.input_ids, "attention_mask": head.attention_mask, "use_cache": True}
    if "position_ids" in known:
        inputs["position_ids"] = head.position_ids
    cache = body(**inputs).past_key_values
    layers: Sequence[Any] = getattr(cache, "layers", ())
    if layers and all(_is_plain(layer, len(head)) for layer in layers):
        return cache
    log.info("the model keeps no plain keys and values of each token: whole rows are run at every step")
    return None


def _moved_to_the_end(cache: Any, mask_RP: Tensor) -> Any:
    """Keys and values that stand at the start of each row, moved to its end; 0 before them."""
    count = mask_RP.shape[1]
    lacking = count - mask_RP.sum(dim=1, keepdim=True)
    index = (torch.arange(count, device=mask_RP.device) - lacking).clamp_min(0)[:, None, :, None]
    real = mask_RP.bool()[:, None, :, None]
    for layer in cache.layers:
        for name in ("keys", "values"):
            kept = getattr(layer, name)
            # Of padding nothing may be left: even no weight times NaN is NaN.
            moved = kept.take_along_dim(index.to(kept.device), dim=2)
            setattr(layer, name, torch.where(real.to(kept.device), moved, 0))
    return cache


def _is_plain(layer: Any, rows: int) -> bool:
    """Whether a layer of a cache holds [R, heads, tokens, F / heads]."""
    kept = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return all(isinstance(t, Tensor) and t.dim() == 4 and t.shape[0] == rows for t in kept)


class Entry:
    """Lets forward passes begin at a layer, with hidden states that entered it in a pass before.

    Args:
        layers: The model's first layers up to and with the one to enter at.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.below, self.layer = list(layers[:-1]), layers[-1]
        self._tuples = [False] * len(self.below)

    @torch.no_grad()
    def states(self, model: nn.Module, rows: RowBatch, prefix: Prefix | None) -> Tensor:
        """What enters the layer, shape [R, S, F]; the pass ends there."""
        seen: list[Tensor] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        with ExitStack() as stack:
            for i, layer in enumerate(self.below):
                stack.callback(layer.register_forward_hook(self._note_kind(i)).remove)
            stack.enter_context(stop_before(self.layer, record))
            run_to(model, rows, prefix)
        return seen[0].to(rows.input_ids.device)

    @contextmanager
    def begin_with(self, hidden_RSF: Tensor) -> Iterator[None]:
        """Have the passes inside begin with these states."""

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((hidden_RSF, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_RSF})

        with ExitStack() as stack:
            for layer, is_tuple in zip(self.below, self._tuples, strict=True):
                stack.enter_context(_passing_on(layer, is_tuple))
            stack.callback(self.layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            yield

    def _note_kind(self, i: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._tuples[i] = isinstance(output, tuple)

        return hook


@contextmanager
def _passing_on(layer: nn.Module, is_tuple: bool) -> Iterator[None]:
    """Let a layer hand on what it gets."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if is_tuple else hidden

    kept = vars(layer).get("forward")
    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if kept is None:
            del layer.forward
        else:
            layer.forward = kept  # type: ignore[method-assign]

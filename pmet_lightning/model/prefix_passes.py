"""Tokens before the subject's last one are run once, and their keys and values cached.

A delta is added at the subject's last token, and causal attention lets no earlier token see it.
Legend: R = rows, P = cached tokens, T = tokens of the longest row, C = selected columns, F = model width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.data.token_rows import RowBatch, TokenRow, pad_rows
from pmet_lightning.model.architectures import depth_of
from pmet_lightning.model.forward import model_inputs
from pmet_lightning.model.hooks import narrow_input
from pmet_lightning.model.kv_prefix import Prefix

log = logging.getLogger(__name__)

_MIN_SAVING = 0.2  # share of the tokens: a separate pass over contexts that saves less is not run


def split_at_subject(model: nn.Module, rows: RowBatch, per_edit: int = 1) -> tuple[Prefix | None, RowBatch]:
    """Run the tokens before each row's subject's last token once; the rest remains to be run.

    Args:
        model: The language model.
        rows: Padded on either side.
        per_edit: Rows per edit; every ``per_edit``-th row has the same context, whose tokens are run once for all.

    Returns:
        The prefix and rows of the remaining tokens, all of which begin at the subject's last token; or ``None`` and
        the rows unchanged, where the model caches no plain keys and values.
    """
    columns = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
    real = rows.attention_mask.bool()
    first = torch.where(real, columns, len(columns)).amin(dim=1)
    last = torch.where(real, columns, -1).amax(dim=1)
    # At least one column, even if of padding alone: then no prefix is empty, and any two can be concatenated.
    most = max(int((rows.subject - first).max()), 1)
    heads = _columns(rows, first.unsqueeze(1) + columns[:most], first, rows.subject - 1)
    unique, first_of = _tokens(heads).unique(dim=0, return_inverse=True)
    index = torch.zeros(len(unique), dtype=torch.long, device=first_of.device)
    index[first_of] = torch.arange(len(first_of), device=first_of.device)
    prefix = _compute_after_contexts(model, _rows(heads, index), index % per_edit)
    if prefix is None:
        return None, rows
    count = int((last - rows.subject).max()) + 1
    tail = _columns(rows, rows.subject.unsqueeze(1) + columns[:count], first, last)
    shifted = rows.label_columns - rows.subject.unsqueeze(1)
    return prefix.select(first_of), replace(tail, subject=torch.zeros_like(rows.subject), label_columns=shifted)


def compute_prefix(model: nn.Module, head: RowBatch) -> Prefix | None:
    """Run some rows once, and keep them as a prefix.

    Args:
        model: The language model.
        head: Rows padded on the right; a row may be empty.

    Returns:
        The prefix; ``None`` where the model caches no plain keys and values.
    """
    # Tokens before padding do not attend to it, whatever a family does at a position that may attend to nothing. But a
    # sliding window would keep the padding and drop tokens: such rows are padded on the left instead.
    cache = _plain_cache(model, run_rows(model.base_model, head), len(head))  # type: ignore[arg-type]
    return None if cache is None else _right_aligned(model, head, cache, head.input_ids.shape[1])


def _compute_after_contexts(model: nn.Module, heads: RowBatch, context_R: Tensor) -> Prefix | None:
    """As :func:`compute_prefix`, but the tokens that all rows of a context begin with are run once.

    Args:
        model: The language model.
        heads: Rows padded on the right.
        context_R: int64, the context of each row.
    """
    tokens = _tokens(heads)
    contexts, group = context_R.unique(return_inverse=True)
    first = torch.stack([(group == i).nonzero()[0, 0] for i in range(len(contexts))])
    differs = (tokens != tokens[first[group]]) | (tokens < 0)
    # The first column in which each row differs from the first row of its context.
    differing = torch.where(differs, torch.arange(tokens.shape[1], device=tokens.device), tokens.shape[1]).amin(dim=1)
    shared = torch.full_like(contexts, tokens.shape[1]).scatter_reduce(0, group, differing, "amin")
    shared[group.bincount() == 1] = 0
    most, lengths = int(shared.max()), heads.attention_mask.sum(dim=1)
    if (shared * (group.bincount() - 1)).sum() <= _MIN_SAVING * lengths.sum():
        return compute_prefix(model, heads)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    beginnings = _columns(
        _rows(heads, first), columns[:most].expand(len(first), -1), torch.zeros_like(shared), shared - 1
    )
    roots = compute_prefix(model, beginnings)
    rest = lengths - shared[group]
    if roots is None or any(layer.keys.shape[-2] < most for layer in roots.cache.layers):
        return None if roots is None else compute_prefix(model, heads)
    wanted = shared[group].unsqueeze(1) + columns[: max(int(rest.max()), 1)]
    tails = _columns(heads, wanted, torch.zeros_like(lengths), lengths - 1)
    output = run_rows(model.base_model, tails, roots.select(group))  # type: ignore[arg-type]
    cache = _plain_cache(model, output, len(heads))
    if any(layer.keys.shape[-2] < most + tails.input_ids.shape[1] for layer in cache.layers):
        return compute_prefix(model, heads)
    mask_RP = columns >= len(columns) - lengths.unsqueeze(1)
    return Prefix(_right_align(cache, mask_RP.long(), most + rest), mask_RP.long())


def read_prompts(model: nn.Module, rows: RowBatch, keep: bool = True) -> tuple[Tensor, Prefix | None]:
    """Logits at the labels of whole rows, and the tokens before the labels as a prefix.

    Args:
        model: The language model.
        rows: Padded on the right, with labels.
        keep: Whether to return the prefix.

    Returns:
        Logits as from :func:`~pmet_lightning.model.forward.label_logits`, and a prefix as from :func:`compute_prefix`.
    """
    with narrow_input(model.get_output_embeddings(), rows.label_positions()):  # type: ignore[operator]
        # No token attends to padding on the right, and attention is faster without a mask.
        output = run_rows(model, rows, masked=False, keep=keep)
    cache = _plain_cache(model, output, len(rows)) if keep else None
    if cache is None:
        return output.logits, None
    last = rows.label_columns[:, 0]
    columns = torch.arange(int(last.max()) + 1, device=last.device).expand(len(rows), -1)
    head = _columns(rows, columns, torch.zeros_like(last), last)
    return output.logits, _right_aligned(model, head, cache, rows.input_ids.shape[1])


def drop_last_token(prefix: Prefix) -> Prefix | None:
    """All but the last token; ``None`` if nothing is left, or if a sliding window has dropped what is needed then."""
    count = prefix.mask_RP.shape[1]
    cache = prefix.fresh()
    if count == 1 or any(layer.keys.shape[-2] < count for layer in cache.layers):
        return None
    _crop(cache, 1)
    return Prefix(cache, prefix.mask_RP[:, :-1])


def _right_aligned(model: nn.Module, head: RowBatch, cache: Any, width: int) -> Prefix:
    """The prefix of rows padded on the right, from a cache of ``width`` columns that begins with them."""
    count = head.input_ids.shape[1]
    lengths = head.attention_mask.sum(dim=1)
    wanted = torch.arange(count, device=lengths.device) - (count - lengths).unsqueeze(1)
    at_end = _columns(head, wanted, torch.zeros_like(lengths), lengths - 1)
    if any(layer.keys.shape[-2] < width for layer in cache.layers):
        cache = run_rows(model.base_model, at_end).past_key_values  # type: ignore[arg-type]
        return Prefix(cache, at_end.attention_mask)
    if width > count:
        _crop(cache, width - count)
    return Prefix(_right_align(cache, at_end.attention_mask, lengths), at_end.attention_mask)


def _tokens(rows: RowBatch) -> Tensor:
    """The token ids of some rows, -1 for padding, shape [R, T]."""
    return torch.where(rows.attention_mask.bool(), rows.input_ids, -1)


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
def run_rows(
    part: nn.Module, rows: RowBatch, prefix: Prefix | None = None, masked: bool = True, keep: bool = True
) -> Any:
    """The output of a model or its body for some rows, with its cache if ``keep``."""
    return part(**model_inputs(part, rows, prefix, masked=masked, keep=keep))


def has_plain_cache(model: nn.Module, device: torch.device) -> bool:
    """Whether tokens before others can be run once: whether all that a model keeps of them are keys and values.

    It is not so where some layers are convolutions or have a recurrent state, or use the keys of another layer.
    """
    row = pad_rows([TokenRow([0])], 0).to(device)
    return _plain_cache(model, run_rows(model.base_model, row), 1) is not None  # type: ignore[arg-type]


def _plain_cache(model: nn.Module, output: Any, rows: int) -> Any:
    """The cache in an output; ``None`` unless it holds plain keys and values of each row in each of its layers."""
    cache = getattr(output, "past_key_values", None)
    layers: Sequence[Any] = getattr(cache, "layers", ())
    if len(layers) == depth_of(model.config) and all(is_plain_layer(layer, rows) for layer in layers):
        return cache
    log.info("the model caches no plain keys and values of each token: whole rows are run at every step")
    return None


def _crop(cache: Any, tokens: int) -> None:
    """Remove the last tokens, at least one, from a cache that has dropped none."""
    for layer in cache.layers:
        layer.crop(-tokens)


def _right_align(cache: Any, mask_RP: Tensor, ends_R: Tensor) -> Any:
    """Keys and values before column ``ends_R`` of each row, moved to the end of P columns; 0 before them."""
    rows, count = mask_RP.shape
    column = torch.arange(count, device=mask_RP.device) - count + ends_R.unsqueeze(1)
    padding = ~mask_RP.bool()[:, None, :, None]
    for layer in cache.layers:
        for name in ("keys", "values"):
            kept = getattr(layer, name).transpose(1, 2)
            width = kept.shape[1]
            index = torch.arange(rows, device=column.device).unsqueeze(1) * width + column.clamp(0, width - 1)
            moved = kept.flatten(0, 1).index_select(0, index.flatten().to(kept.device)).unflatten(0, (rows, count))
            # Nothing of the padding may remain: even a weight of zero times NaN is NaN.
            setattr(layer, name, moved.transpose(1, 2).masked_fill_(padding.to(kept.device), 0))
        # A sliding window counts the columns it has seen, and transformers derives its mask from that count.
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = count
    return cache


def is_plain_layer(layer: Any, rows: int) -> bool:
    """Whether a layer of a cache holds nothing but keys and values [R, heads, tokens, F / heads] and their count.

    By exact type: other layers (quantized, static, indexed, of a state-space model) are subclasses with more state.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return False
    return all(isinstance(t, Tensor) and t.dim() == 4 and t.shape[0] == rows for t in (layer.keys, layer.values))

"""Inputs and outputs of attention and FFN in every layer, at some tokens of each row.

A component's output is what it adds to the residual stream: that of its output projection, after the norm that some
families have there. Its input is the residual stream that enters the norm before it: h^(l-1) for attention and, in
parallel blocks, for the FFN too; h^(l-1) + a^l for the FFN of sequential blocks.
Legend: R = rows, T = tokens, L = layers, K = selected columns, F = model width.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.data.token_rows import RowBatch
from pmet_lightning.model.architectures import UnknownArchitectureError
from pmet_lightning.model.forward import run_to
from pmet_lightning.model.hooks import record_and_add, record_whole, stop_after
from pmet_lightning.model.projections import Sites

_SUM_TOLERANCE = 0.02  # relative; half precision rounds every sum


@dataclass(frozen=True)
class Streams:
    """Residual stream and components, all of shape [L, R, K, F].

    Attributes:
        entering: h^(l-1).
        attn: a^l.
        ffn_input: Input of the FFN's norm.
        ffn: m^l.
        leaving: h^l.
    """

    entering: Tensor
    attn: Tensor
    ffn_input: Tensor
    ffn: Tensor
    leaving: Tensor


@torch.no_grad()
def streams_of(model: nn.Module, sites: Sites, rows: RowBatch, columns_RK: Tensor, parallel: bool) -> Streams:
    """Run some rows, and record inputs and outputs of attention and FFN.

    Args:
        model: The language model.
        sites: Its modules.
        rows: The rows.
        columns_RK: int64, the selected columns.
        parallel: Whether its blocks are parallel, as returned by :func:`is_parallel`.

    Raises:
        UnknownArchitectureError: If a layer's output is not its input plus its two components.
    """
    rows_R1 = torch.arange(len(rows), device=columns_RK.device).unsqueeze(1)
    with ExitStack() as stack:
        recordings = [
            [
                stack.enter_context(record_whole(layer, len(rows), output=False)),
                *(stack.enter_context(record_whole(sites.module(site, i), len(rows))) for site in ("attn", "ffn")),
                stack.enter_context(record_whole(layer, len(rows))),
            ]
            for i, layer in enumerate(sites.layers)
        ]
        run_to(model, rows)
    picked = [[recording.take()[rows_R1, columns_RK] for recording in own] for own in recordings]
    entering, attn, ffn, leaving = (torch.stack(parts) for parts in zip(*picked, strict=True))
    attn, ffn = _after_norms(sites, "attn", attn), _after_norms(sites, "ffn", ffn)
    difference = (leaving - entering - attn - ffn).float().norm() / leaving.float().norm()
    if not difference <= _SUM_TOLERANCE:
        raise UnknownArchitectureError(
            f"a layer's output is not its input plus attention plus FFN (relative difference {float(difference):.2g}); "
            "expected a model whose residual stream is a sum. Models that normalize the stream itself, such as "
            "OPT-350m, cannot be analyzed; for others, check --model.architecture (attn_norm and ffn_norm)."
        )
    return Streams(entering, attn, entering if parallel else entering + attn, ffn, leaving)


def _after_norms(sites: Sites, site: Any, outputs_LRKF: Tensor) -> Tensor:
    norms = [sites.norm(site, layer) for layer in range(len(sites.layers))]
    return torch.stack([x if norm is None else norm(x) for norm, x in zip(norms, outputs_LRKF, strict=True)])


@torch.no_grad()
def is_parallel(model: nn.Module, sites: Sites, rows: RowBatch) -> bool:
    """Whether the FFN does not receive the output of its own layer's attention: tried out on the first layer."""
    block, seen = sites.ffn_block(0) or sites.module("ffn", 0), []
    step = torch.randn(len(rows), sites.width, generator=torch.Generator().manual_seed(0)).to(rows.input_ids.device)
    for added in (None, step):
        with (
            record_and_add(sites.module("attn", 0), rows.subject, added),
            record_whole(block, len(rows), output=False) as ffn_input,
            stop_after(sites.layers[0]),
        ):
            run_to(model, rows)
        seen.append(ffn_input.take())
    return bool(torch.equal(*seen))


def returns_tuples(model: nn.Module, sites: Sites, rows: RowBatch) -> bool:
    """Whether the model's layers return tuples, with their output as the first item."""
    kinds: list[bool] = []
    hook = sites.layers[0].register_forward_hook(lambda _, __, output: kinds.append(isinstance(output, tuple)))
    try:
        with torch.no_grad(), stop_after(sites.layers[0]):
            run_to(model, rows)
    finally:
        hook.remove()
    return kinds[0]

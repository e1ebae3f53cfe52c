"""Keys, current values and what the edited model answers: step 2 of METHOD.md.

Legend: N = edits, I = in-features (d_k), F = width of a site's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.architectures import SiteName, Sites, in_features
from pmet_lightning.edits import Edit
from pmet_lightning.edits.requests import BARE, key_row
from pmet_lightning.language_model import run_to
from pmet_lightning.sites import record_and_add, record_input, stop_after
from pmet_lightning.tokens import PromptEncoder, TokenRow, by_token_budget, pad_rows


@dataclass(frozen=True)
class Measurement:
    """What a pass over an edit batch needs besides the model.

    Attributes:
        rows: The bare row of every edit, then the rows of the first context, and so on.
        count: N.
        pad_id: Padding token.
        tokens_per_batch: Most padded tokens in one forward pass.
        device: Where the model is.
    """

    rows: list[TokenRow]
    count: int
    pad_id: int
    tokens_per_batch: int
    device: torch.device

    @classmethod
    def of(
        cls,
        edits: Sequence[Edit],
        contexts: Sequence[str],
        encoder: PromptEncoder,
        tokens_per_batch: int,
        device: torch.device,
    ) -> Measurement:
        """Tokenise an edit batch once for all layers."""
        rows = [key_row(edit, context, encoder) for context in (BARE, *contexts) for edit in edits]
        return cls(rows, len(edits), encoder.pad_id, tokens_per_batch, device)


def collect_keys(model: nn.Module, sites: Sites, site: SiteName, layer: int, over: Measurement) -> Tensor:
    """k = ½ · key in the bare prompt + ½ · mean of the keys in the contexts, at the subject's last token.

    Returns:
        Shape [N, I], float32 or float64, on the model's device. Without contexts the bare keys alone.
    """
    projection = sites.module(site, layer)
    keys = _collect(model, projection, over.rows, over, record_input, in_features(projection))
    bare, contexts = keys[: over.count], keys[over.count :]
    if not len(contexts):
        return bare
    return (bare + contexts.unflatten(0, (-1, over.count)).mean(dim=0)) / 2


def collect_values(model: nn.Module, sites: Sites, site: SiteName, layer: int, over: Measurement) -> Tensor:
    """The current output of a site at the subject's last token of each bare prompt, shape [N, F]."""
    module = sites.module(site, layer)
    return _collect(model, module, over.rows[: over.count], over, record_and_add, sites.width)


@torch.no_grad()
def _collect(
    model: nn.Module,
    module: nn.Module,
    rows: Sequence[TokenRow],
    over: Measurement,
    recorder: Any,
    width: int,
) -> Tensor:
    """Record one vector a row, by passes that end at the recorded module."""
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    values = torch.empty(len(rows), width, dtype=dtype, device=over.device)
    for indices in by_token_budget([len(row.ids) for row in rows], over.tokens_per_batch):
        batch = pad_rows([rows[i] for i in indices], over.pad_id).to(over.device)
        with recorder(module, batch.subject) as recording, stop_after(module):
            run_to(model, batch)
        values[indices] = recording.take().to(dtype)
    return values

"""What the layers above have at the subject's last token while an edit's deltas are in place: their targets.

Legend: B = edits, F = model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from pmet_lightning.data.token_rows import PaddingSide, TokenRow, pad_rows
from pmet_lightning.model.architectures import ProjectionId, SiteName
from pmet_lightning.model.forward import run_to
from pmet_lightning.model.hooks import record_and_add, stop_after


@torch.no_grad()
def replayed_values(
    model: nn.Module,
    rows: Sequence[TokenRow],
    deltas: Mapping[SiteName, Tensor],
    modules: Mapping[SiteName, nn.Module],
    later: Mapping[ProjectionId, nn.Module],
    *,
    pad_id: int,
    padding_side: PaddingSide,
) -> dict[ProjectionId, Tensor]:
    """Outputs of modules at the subject's last token of each row, with its deltas added below.

    Args:
        model: The language model.
        rows: Row of the bare prompt of each edit; nothing behind its subject is run.
        deltas: The deltas of each site, shape [B, F].
        modules: Where they are added.
        later: The modules above whose outputs are wanted, the uppermost last.
        pad_id: Padding token.
        padding_side: Where rows are padded.

    Returns:
        Shape [B, F] each, in the precision of the deltas.
    """
    like = next(iter(deltas.values()))
    cut = [TokenRow(row.ids[: row.subject + 1], row.subject) for row in rows]
    batch = pad_rows(cut, pad_id, padding_side).to(like.device)
    with ExitStack() as stack:
        for site, module in modules.items():
            stack.enter_context(record_and_add(module, batch.subject, deltas[site]))
        found = {place: stack.enter_context(record_and_add(module, batch.subject)) for place, module in later.items()}
        stack.enter_context(stop_after(list(later.values())[-1]))
        run_to(model, batch, None)
    return {place: recording.take().to(like) for place, recording in found.items()}

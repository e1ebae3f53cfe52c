"""Whether passes over what a delta can reach give what passes over the whole model do, found by a trial.

It does for the families that are known. One that is described by hand may have layers with inputs of their own, or with
the keys of another layer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pmet_lightning.data.token_rows import TokenRow, pad_rows
from pmet_lightning.model.architectures import SiteName
from pmet_lightning.model.partial_forward import PartialForward
from pmet_lightning.model.prefix_passes import has_plain_cache
from pmet_lightning.targets.row_cache import RowSet
from pmet_lightning.utils.memory import is_out_of_memory

log = logging.getLogger(__name__)

_TOLERANCE, _TOLERANCE_IN_HALF = 1e-3, 0.1  # of the largest logit


@torch.no_grad()
def suffix_agrees(
    model: nn.Module,
    modules: Mapping[SiteName, nn.Module],
    partial_forward: PartialForward,
    rows: Sequence[TokenRow],
    width: int,
    device: torch.device,
) -> bool:
    """Compare the logits of both ways for the rows of one edit, without deltas.

    Args:
        model: The language model.
        modules: The module of each optimized site at layer L.
        partial_forward: Starts passes at layer L; used for nothing else afterwards.
        rows: Rows of one edit, with labels.
        width: Width of the model.
        device: Where the model is.
    """
    if not has_plain_cache(model, device):
        return False
    batch = pad_rows(rows, 0).to(device)
    leaves: dict[SiteName, Tensor] = {site: torch.zeros(1, width, device=device) for site in modules}

    def logits(kept: RowSet) -> Tensor:
        return kept.run(model, modules, leaves, partial_forward)[0].whole().float()

    try:
        whole = logits(RowSet(batch, len(rows)))
        kept = RowSet.of(model, batch, len(rows), partial_forward)
        parts = [logits(kept), logits(kept)]  # the second one calls the layers themselves
    except Exception as error:  # whatever a family that nobody has tried does with such a pass
        if is_out_of_memory(error):
            raise
        log.info("whole rows are run at every step: passes from a layer on fail (%s: %s)", type(error).__name__, error)
        return False
    tolerance = _TOLERANCE if next(model.parameters()).element_size() > 2 else _TOLERANCE_IN_HALF
    worst = max(float((part - whole).abs().max()) for part in parts)
    if worst <= tolerance * float(whole.abs().max()):
        return True
    log.info("whole rows are run at every step: passes from a layer on differ by %.2g in a logit", worst)
    return False

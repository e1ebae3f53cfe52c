"""Running sums of k kᵀ over general text, or over the tokens after subjects, in one pass for many layers.

Legend: R = rows, T = tokens, I = in-features (d_k).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.data.token_rows import RowBatch, TokenRow, pad_rows
from pmet_lightning.model.architectures import ProjectionId
from pmet_lightning.model.forward import run_to
from pmet_lightning.model.hooks import stop_after
from pmet_lightning.model.projections import Sites, in_features
from pmet_lightning.moments.store import MomentError
from pmet_lightning.solver.packed import BLOCK_ROWS


class MomentSums:
    """Running Σ k kᵀ of some projections: products of a batch in the model's precision, their sum in float64.

    Args:
        model: The language model.
        sites: Its modules.
        projection_ids: Sites and layers.
        pad_id: Padding token; padded positions add exactly nothing.
        device: Where the model is.
    """

    def __init__(
        self, model: nn.Module, sites: Sites, projection_ids: Sequence[ProjectionId], pad_id: int, device: torch.device
    ) -> None:
        self.model, self.pad_id, self.device = model, pad_id, device
        self.modules = {projection_id: sites.module(*projection_id) for projection_id in projection_ids}
        self.last = sites.layers[max(layer for _, layer in projection_ids)]
        self.tokens = 0
        # Only the lower triangles hold sums; entries above the blocks on the diagonal stay zero.
        self.lower = {
            projection_id: torch.zeros(in_features(m), in_features(m), dtype=torch.float64, device=device)
            for projection_id, m in self.modules.items()
        }

    @torch.no_grad()
    def add(self, rows: Sequence[TokenRow]) -> None:
        """Add every token of some texts, or those after the subject, in one pass that ends after the last layer."""
        batch: RowBatch = pad_rows(rows, self.pad_id).to(self.device)
        mask_RT = batch.after_subject()
        self.tokens += int(mask_RT.sum())
        with ExitStack() as stack:
            for projection_id, module in self.modules.items():
                stack.enter_context(_sum_inputs(module, mask_RT, self.lower[projection_id]))
            with stop_after(self.last):
                run_to(self.model, batch)


@contextmanager
def _sum_inputs(module: nn.Module, mask_RT: Tensor, lower_II: Tensor) -> Iterator[None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        keys_TI = inputs[0].reshape(*mask_RT.shape, -1)[mask_RT.to(inputs[0].device)]
        keys_TI = keys_TI.to(lower_II.device, torch.promote_types(keys_TI.dtype, torch.float32))
        # The product is symmetric: block rows up to the diagonal are about half of it.
        for start in range(0, len(lower_II), BLOCK_ROWS):
            end = start + BLOCK_ROWS
            lower_II[start:end, :end] += keys_TI[:, start:end].T @ keys_TI[:, :end]

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def memory_groups(widths: Mapping[ProjectionId, int], available: int) -> list[list[ProjectionId]]:
    """Projections whose sums fit into memory together; each group is a pass of its own over the corpus.

    A projection always needs its sum in float64 and its previous moment in float32, and at times one float64 matrix.

    Args:
        widths: d_k of each projection, in order.
        available: Free bytes.

    Raises:
        MomentError: If not even one projection fits.
    """
    groups: list[list[ProjectionId]] = [[]]
    used = 0
    for projection_id, width in widths.items():
        kept, working = 12 * width * width, 8 * width * width
        if kept + working > available:
            site, layer = projection_id
            raise MomentError(
                f"the second moments of {site} in layer {layer} need {(kept + working) / 2**30:.1f} GiB for keys of "
                f"width {width}, and {available / 2**30:.1f} GiB are free; expected a machine with more memory"
            )
        if used + kept + working > available:
            groups.append([])
            used = 0
        groups[-1].append(projection_id)
        used += kept
    return groups

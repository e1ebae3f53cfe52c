"""Keys and current values of an edit batch (docs/method.md, 'Keys').

One pass over the bare prompts gives the keys of a layer and the values at the target layer; one pass for each context
gives the keys in that context. Tokens that all rows of a context begin with are run once. Another pass gives the keys
of the tokens that follow the subject.
Legend: N = edits, I = in-features (d_k), F = width of a site's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os.path import commonprefix

import torch
from torch import Tensor, nn

from pmet_lightning.data.edit_rows import BARE, key_row
from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.data.records import Edit
from pmet_lightning.data.token_rows import RowBatch, TokenRow, by_token_budget, pad_rows
from pmet_lightning.model.architectures import ProjectionId
from pmet_lightning.model.forward import run_to
from pmet_lightning.model.hooks import record_and_add, record_input, stop_after
from pmet_lightning.model.prefix_passes import compute_prefix
from pmet_lightning.model.projections import Sites, in_features
from pmet_lightning.moments.sums import MomentSums
from pmet_lightning.solver.packed import symmetrize


@dataclass(frozen=True)
class SharedRows:
    """Rows that begin with the same tokens.

    Attributes:
        head: The shared tokens.
        tails: The rest of each row, at least one token.
    """

    head: list[int]
    tails: list[TokenRow]

    @classmethod
    def of(cls, rows: Sequence[TokenRow]) -> SharedRows:
        """Split rows, each of which ends at its subject's last token."""
        head = list(commonprefix([row.ids[:-1] for row in rows]))
        return cls(head, [TokenRow(row.ids[len(head) :], row.subject - len(head)) for row in rows])

    def whole(self) -> SharedRows:
        """The same rows with nothing shared."""
        count = len(self.head)
        return SharedRows([], [TokenRow([*self.head, *row.ids], row.subject + count) for row in self.tails])


@dataclass(frozen=True)
class KeyRows:
    """What a pass over an edit batch needs besides the model.

    Attributes:
        bare: The bare row of every edit.
        contexts: Their rows in each context.
        pad_id: Padding token.
        tokens_per_batch: Maximum number of padded tokens in one forward pass.
        device: Where the model is.
    """

    bare: SharedRows
    contexts: list[SharedRows]
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
    ) -> KeyRows:
        """Tokenize an edit batch, once for all layers."""
        bare, *others = (
            SharedRows.of([key_row(edit, context, encoder) for edit in edits]) for context in (BARE, *contexts)
        )
        return cls(bare, others, encoder.pad_id, tokens_per_batch, device)


@dataclass(frozen=True)
class _Point:
    """Where a vector is recorded: the input or the output of a module."""

    module: nn.Module
    output: bool
    width: int


def measure_keys(
    model: nn.Module, sites: Sites, projection_id: ProjectionId, values_at: Sequence[ProjectionId], over: KeyRows
) -> tuple[Tensor, list[Tensor]]:
    """The keys of a projection, and current values of sites in its layer or above it.

    A key is ½ · key in the bare prompt + ½ · mean of the keys in the contexts, at the subject's last token; without
    contexts it is that of the bare prompt.

    Args:
        model: The language model, as edited so far.
        sites: Its modules.
        projection_id: The projection.
        values_at: Sites and layers, the uppermost last.
        over: Rows of the edit batch.

    Returns:
        Keys, shape [N, I], and the values in the bare prompts, shape [N, F] each; float32 or float64, on the model's
        device.
    """
    (keys_NI,), values = _measure(model, sites, [projection_id], values_at, over, over.device)
    return keys_NI, values


def measure_all_keys(
    model: nn.Module, sites: Sites, projections: Sequence[ProjectionId], over: KeyRows
) -> list[Tensor]:
    """The keys of several projections on the model as it is, each as of :func:`measure_keys`, but on the CPU.

    One pass over the rows gives those of all layers.

    Args:
        model: The language model.
        sites: Its modules.
        projections: In the order of writing.
        over: Rows of the edits.
    """
    return _measure(model, sites, projections, [], over, torch.device("cpu"))[0]


def measure_values(model: nn.Module, sites: Sites, values_at: Sequence[ProjectionId], over: KeyRows) -> list[Tensor]:
    """The outputs of sites, the uppermost last, at the subject's last token of each bare prompt, shape [N, F] each."""
    return _record(model, over.bare, [_value_point(sites, where) for where in values_at], over, over.device)


def measure_rest(
    model: nn.Module, sites: Sites, projection_id: ProjectionId, rows: Sequence[TokenRow], over: KeyRows
) -> Tensor:
    """R Rᵀ of a projection, where R are the keys of all tokens that follow the subject's last one.

    Args:
        model: The language model, as edited so far.
        sites: Its modules.
        projection_id: The projection.
        rows: Prompts with their targets (:func:`~pmet_lightning.data.edit_rows.whole_row`).
        over: How they are run.

    Returns:
        The sum over tokens, float64, shape [I, I], on the model's device; zeros where no token follows a subject.
    """
    sums = MomentSums(model, sites, [projection_id], over.pad_id, over.device)
    longer = [row for row in rows if len(row.ids) > row.subject + 1]
    for indices in by_token_budget([len(row.ids) for row in longer], over.tokens_per_batch):
        sums.add([longer[i] for i in indices])
    return symmetrize(sums.lower[projection_id])


def _measure(
    model: nn.Module,
    sites: Sites,
    projections: Sequence[ProjectionId],
    values_at: Sequence[ProjectionId],
    over: KeyRows,
    device: torch.device,
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys of projections, and current values of sites, on a device; contexts are added up one by one."""
    points = [_key_point(sites, where) for where in projections]
    values = [_value_point(sites, where) for where in values_at]
    found = _record(model, over.bare, [*points, *values], over, device)
    keys = found[: len(points)]
    if over.contexts:
        first, *others = over.contexts
        sums = _record(model, first, points, over, device)
        for rows in others:
            for sum_NI, keys_NI in zip(sums, _record(model, rows, points, over, device), strict=True):
                sum_NI.add_(keys_NI)
        for bare_NI, sum_NI in zip(keys, sums, strict=True):
            bare_NI.add_(sum_NI.div_(len(over.contexts))).div_(2)
    return keys, found[len(points) :]


def _key_point(sites: Sites, where: ProjectionId) -> _Point:
    projection = sites.module(*where)
    return _Point(projection, False, in_features(projection))


def _value_point(sites: Sites, where: ProjectionId) -> _Point:
    return _Point(sites.module(*where), True, sites.width)


@torch.no_grad()
def _record(
    model: nn.Module, rows: SharedRows, points: Sequence[_Point], settings: KeyRows, kept_on: torch.device
) -> list[Tensor]:
    """Record vectors of every row, in passes that end at the last point."""
    pad_id, device = settings.pad_id, settings.device
    prefix = compute_prefix(model, pad_rows([TokenRow(rows.head)], pad_id).to(device)) if rows.head else None
    if prefix is None:
        rows = rows.whole()
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    found = [torch.empty(len(rows.tails), point.width, dtype=dtype, device=kept_on) for point in points]
    for indices in by_token_budget([len(row.ids) for row in rows.tails], settings.tokens_per_batch):
        batch = _shift_positions(pad_rows([rows.tails[i] for i in indices], pad_id), len(rows.head)).to(device)
        with ExitStack() as stack:
            recordings = [
                stack.enter_context((record_and_add if point.output else record_input)(point.module, batch.subject))
                for point in points
            ]
            stack.enter_context(stop_after(points[-1].module))
            run_to(model, batch, None if prefix is None else prefix.repeated(len(batch)))
        for values, recording in zip(found, recordings, strict=True):
            values[indices] = recording.take().to(values)
    return found


def _shift_positions(rows: RowBatch, count: int) -> RowBatch:
    """The rows at positions that follow ``count`` other tokens."""
    return replace(rows, position_ids=rows.position_ids + count)

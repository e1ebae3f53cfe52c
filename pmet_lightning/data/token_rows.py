"""Tokenized texts and batches of them, padded on either side.

Legend: R = rows, T = tokens of the longest row, K = tokens of the longest target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

PaddingSide = Literal["left", "right"]
IGNORE = -100  # label of a position that is not part of a target


@dataclass(frozen=True)
class TokenRow:
    """One tokenized text.

    Attributes:
        ids: Token ids that the model reads.
        subject: Index in ``ids`` of the subject's last token, -1 for a text without a subject.
        labels: Ids of the target; the logits at the last ``len(labels)`` positions predict them.
    """

    ids: list[int]
    subject: int = -1
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class RowBatch:
    """Rows padded to one length.

    Attributes:
        input_ids: int64, shape [R, T].
        attention_mask: int64, shape [R, T], 1 for real tokens.
        position_ids: int64, shape [R, T], counted over real tokens so that they do not depend on padding.
        subject: int64, shape [R], column of the subject's last token.
        label_ids: int64, shape [R, K], ``IGNORE`` where a target is shorter than K.
        label_columns: int64, shape [R, K], column whose logits predict the label; the row's last real
            column where there is no label.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    subject: Tensor
    label_ids: Tensor
    label_columns: Tensor

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def to(self, device: torch.device) -> RowBatch:
        """The same rows on another device."""
        return RowBatch(**{name: value.to(device) for name, value in vars(self).items()})

    def select(self, rows: Tensor) -> RowBatch:
        """The given rows (an index or a boolean mask, shape [R]), without columns that none of them uses."""
        picked = {name: value[rows] for name, value in vars(self).items()}
        used = self.used_columns(rows)
        for name in ("input_ids", "attention_mask", "position_ids"):
            picked[name] = picked[name][:, used]
        picked["subject"] = picked["subject"] - used.start
        picked["label_columns"] = picked["label_columns"] - used.start
        return RowBatch(**picked)

    def join(self, other: RowBatch) -> RowBatch:
        """These rows followed by the other's, padded on the right to one width."""
        joined = {}
        for name, value in vars(self).items():
            more = getattr(other, name)
            if value.dim() == 2:
                width = max(value.shape[1], more.shape[1])
                value, more = (_widened(tensor, width, name) for tensor in (value, more))
            joined[name] = torch.cat([value, more])
        return RowBatch(**joined)

    def first_columns(self, count: int) -> RowBatch:
        """The same rows, cut after their first ``count`` columns; for passes without labels."""
        cut = {name: getattr(self, name)[:, :count] for name in ("input_ids", "attention_mask", "position_ids")}
        return replace(self, **cut)

    def used_columns(self, rows: Tensor) -> slice:
        """From the first to the last column that any of the given rows uses."""
        used = self.attention_mask[rows].any(dim=0).nonzero().flatten()
        return slice(int(used[0]), int(used[-1]) + 1)

    def label_positions(self) -> Tensor:
        """``label_columns`` counted over all columns of all rows, shape [R, K]."""
        starts = torch.arange(len(self), device=self.label_columns.device).unsqueeze(1) * self.input_ids.shape[1]
        return starts + self.label_columns

    def after_subject(self) -> Tensor:
        """Which columns are tokens after the subject, or any tokens of a text that has none; bool, shape [R, T]."""
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return self.attention_mask.bool() & (columns > self.subject.unsqueeze(1))

    def real_positions(self) -> Tensor:
        """Positions of the real tokens, counted over all columns of all rows."""
        return self.attention_mask.flatten().nonzero().flatten()


def _widened(tensor_RC: Tensor, width: int, name: str) -> Tensor:
    """A field of a :class:`RowBatch` with more columns: no tokens, no labels, and the last label column repeated."""
    count = width - tensor_RC.shape[1]
    if name == "label_columns":
        return torch.cat([tensor_RC, tensor_RC[:, -1:].expand(-1, count)], dim=1)
    return nn.functional.pad(tensor_RC, (0, count), value=IGNORE if name == "label_ids" else 0)


def pad_rows(rows: Sequence[TokenRow], pad_id: int, side: PaddingSide = "right") -> RowBatch:
    """Pad rows to one length; every index is shifted along, so that left and right padding give the same numbers."""
    width, most = max(len(row.ids) for row in rows), max(1, max(len(row.labels) for row in rows))
    ids = [[pad_id] * (width - len(row.ids)) for row in rows]
    ids = [[*pad, *row.ids] if side == "left" else [*row.ids, *pad] for pad, row in zip(ids, rows, strict=True)]
    labels = [[*row.labels, *[IGNORE] * (most - len(row.labels))] for row in rows]
    lengths, counts, subject = torch.tensor([(len(row.ids), len(row.labels), row.subject) for row in rows]).unbind(1)
    first = width - lengths if side == "left" else torch.zeros_like(lengths)
    end = first + lengths
    columns = torch.arange(max(width, most))
    mask = (columns[:width] >= first.unsqueeze(1)) & (columns[:width] < end.unsqueeze(1))
    return RowBatch(
        input_ids=torch.tensor(ids, dtype=torch.long),
        attention_mask=mask.long(),
        position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
        subject=first + subject,
        label_ids=torch.tensor(labels, dtype=torch.long),
        label_columns=torch.minimum((end - counts).unsqueeze(1) + columns[:most], end.unsqueeze(1) - 1),
    )


def by_token_budget(lengths: Sequence[int], budget: int, most: float = math.inf) -> list[list[int]]:
    """Split row indices into batches of similar length whose padded size stays within a budget.

    Args:
        lengths: Length of each row.
        budget: Maximum number of padded tokens of a batch; a longer row is a batch of its own.
        most: Maximum number of rows of a batch.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and len(batches[-1]) < most and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches

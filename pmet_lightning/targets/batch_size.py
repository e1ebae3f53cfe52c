"""How much memory there is, what an edit in flight needs of it, and whether an error says that it was not enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pmet_lightning.data.token_rows import TokenRow

# Of what is free, the share that edits in flight may take: attention, the allocator and other programs want some too.
_SHARE = 0.5
# Vectors of the model's width that a layer keeps of each token for its gradient: the families' lie between 15 and 35.
_KEPT = 40
# Bytes kept of each logit: as it is, in float32, its exponential and its gradient.
_LOGIT_BYTES = 16
# Tokens in flight beyond which a device gains nothing (benchmarks/targets.py).
_MOST_TOKENS = {"cpu": 4096}
_MOST_TOKENS_ELSEWHERE = 65536


@dataclass(frozen=True)
class ModelSize:
    """What decides the memory of an edit in flight.

    Attributes:
        width: F.
        layers: All of them.
        layers_run: Those run at every step.
        vocabulary: V.
        itemsize: Bytes of a number in the forward pass.
        whole_rows: Whether every token is run at every step, or only those from the subject's last on.
    """

    width: int
    layers: int
    layers_run: int
    vocabulary: int
    itemsize: int
    whole_rows: bool

    def edit_bytes(self, rows: Sequence[TokenRow]) -> int:
        """An estimate, on the safe side, of what one edit takes while it is in flight.

        Args:
            rows: Its rows.
        """
        tail = longest_tail(rows, self.whole_rows)
        head = 0 if self.whole_rows else max(row.subject for row in rows)
        labels = sum(max(1, len(row.labels)) for row in rows)
        hidden = self.itemsize * self.width * (_KEPT * tail * self.layers_run + 2 * head * self.layers)
        return len(rows) * hidden + _LOGIT_BYTES * labels * self.vocabulary

    def most_edits(self, rows: Sequence[TokenRow], device: torch.device, free: int) -> int:
        """How many edits like this one fit beside each other; at least one.

        Args:
            rows: Rows of the longest edit.
            device: Where the model is.
            free: Bytes free there.
        """
        by_memory = int(_SHARE * free) // self.edit_bytes(rows)
        most_tokens = _MOST_TOKENS.get(device.type, _MOST_TOKENS_ELSEWHERE)
        by_tokens = most_tokens // (len(rows) * longest_tail(rows, self.whole_rows))
        return max(1, min(by_memory, by_tokens))


def longest_tail(rows: Sequence[TokenRow], whole_rows: bool) -> int:
    """Tokens that the longest of some rows runs at every step."""
    return max(len(row.ids) - (0 if whole_rows else row.subject) for row in rows)

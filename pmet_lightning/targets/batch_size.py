"""How many edits can be optimized together: an estimate from the size of the model and the free memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pmet_lightning.data.token_rows import TokenRow

# Share of the free memory that active edits may take: attention, the allocator and other programs need some too.
_MEMORY_SHARE = 0.5
# Vectors of the model's width that a layer keeps of each token for the backward pass: 15 to 35 in the known families.
_KEPT_VECTORS = 40
# Bytes kept of each logit: the logit as it is, in float32, its exponential and its gradient.
_LOGIT_BYTES = 16
# Where logits are made part by part: the clean log-probabilities at the KL prompt, and a copy while others join them.
_CLEAN_BYTES = 8
# Active tokens beyond which a device gains nothing (benchmarks/targets.py).
_MAX_TOKENS = {"cpu": 4096}
_MAX_TOKENS_ELSEWHERE = 65536


@dataclass(frozen=True)
class ModelSize:
    """What decides how much memory an active edit takes.

    Attributes:
        width: F.
        layers: Number of layers.
        layers_run: Number of layers run at every step.
        vocabulary: V.
        itemsize: Bytes of a number in the forward pass.
        whole_rows: Whether every token is run at every step, or only those from the subject's last token on.
        whole_logits: Whether all logits are there at once, or part of them at a time.
    """

    width: int
    layers: int
    layers_run: int
    vocabulary: int
    itemsize: int
    whole_rows: bool
    whole_logits: bool

    def edit_bytes(self, rows: Sequence[TokenRow]) -> int:
        """A conservative estimate of the memory that one edit takes while it is active.

        Args:
            rows: Its rows.
        """
        tail = longest_tail(rows, self.whole_rows)
        head = 0 if self.whole_rows else max(row.subject for row in rows)
        labels = sum(max(1, len(row.labels)) for row in rows)
        hidden = self.itemsize * self.width * (_KEPT_VECTORS * tail * self.layers_run + 2 * head * self.layers)
        logits = _LOGIT_BYTES * labels if self.whole_logits else _CLEAN_BYTES
        return len(rows) * hidden + logits * self.vocabulary

    def most_edits(self, rows: Sequence[TokenRow], device: torch.device, free: int) -> int:
        """How many edits like this one fit into memory together; at least one.

        Args:
            rows: Rows of the longest edit.
            device: Where the model is.
            free: Bytes free there.
        """
        by_memory = int(_MEMORY_SHARE * free) // self.edit_bytes(rows)
        max_tokens = _MAX_TOKENS.get(device.type, _MAX_TOKENS_ELSEWHERE)
        by_tokens = max_tokens // (len(rows) * longest_tail(rows, self.whole_rows))
        return max(1, min(by_memory, by_tokens))


def longest_tail(rows: Sequence[TokenRow], whole_rows: bool) -> int:
    """Number of tokens that the longest of some rows runs at every step."""
    return max(len(row.ids) - (0 if whole_rows else row.subject) for row in rows)

"""Keys and values of tokens that have already been run.

Legend: R = rows, P = cached tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Prefix:
    """Cached keys and values of the tokens before the ones that are run.

    Attributes:
        cache: A Hugging Face cache, never given to a model itself: a forward pass writes into the cache that it gets.
        mask_RP: int64, shape [R, P], 1 for real tokens, which are at the end.
    """

    cache: Any
    mask_RP: Tensor

    def fresh(self) -> Any:
        """A cache for one forward pass; it shares the tensors, which are replaced, never written into."""
        return self._with_layers([copy.copy(layer) for layer in self.cache.layers])

    def select(self, rows: Tensor) -> Prefix:
        """The given rows (a boolean mask, shape [R], or an index)."""
        layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in layers:
            layer.batch_select_indices(rows.to(layer.keys.device))
        return Prefix(self._with_layers(layers), self.mask_RP[rows])

    def repeated(self, count: int) -> Prefix:
        """The only row, repeated ``count`` times without copying it."""
        layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in layers:
            layer.keys, layer.values = (t.expand(count, -1, -1, -1) for t in (layer.keys, layer.values))
        return Prefix(self._with_layers(layers), self.mask_RP.expand(count, -1))

    def _with_layers(self, layers: list[Any]) -> Any:
        cache = copy.copy(self.cache)
        cache.layers = layers
        return cache


def concatenate_prefixes(parts: Sequence[Prefix]) -> Prefix:
    """The rows of several prefixes of one model, concatenated; the shorter ones get empty columns in front."""
    longest = max(parts, key=lambda part: part.mask_RP.shape[1])
    layers = [copy.copy(layer) for layer in longest.cache.layers]
    for i, layer in enumerate(layers):
        for name in ("keys", "values"):
            # A sliding window keeps fewer columns than there are.
            width = getattr(layer, name).shape[-2]
            kept = [getattr(part.cache.layers[i], name) for part in parts]
            setattr(layer, name, torch.cat([pad(t, (0, 0, width - t.shape[-2], 0)) for t in kept]))
    width = longest.mask_RP.shape[1]
    mask_RP = torch.cat([pad(part.mask_RP, (width - part.mask_RP.shape[1], 0)) for part in parts])
    return Prefix(longest._with_layers(layers), mask_RP)


def gather_rows(prefixes: Sequence[Prefix], rows: Sequence[int]) -> Prefix:
    """Some rows of several prefixes of one model, as long as the longest of these.

    Args:
        prefixes: The prefixes that hold the rows.
        rows: Their indices, ascending, counted over all prefixes.
    """
    parts, start = [], 0
    for prefix in prefixes:
        end = start + len(prefix.mask_RP)
        inside = [row - start for row in rows if start <= row < end]
        if inside:
            parts.append(prefix.select(torch.tensor(inside, device=prefix.mask_RP.device)))
        start = end
    return concatenate_prefixes(parts)

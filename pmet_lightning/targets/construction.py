"""Where the targets of the edited layers come from (docs/method.md, 'Constructions').

``spread`` (PMET, MEMIT): one target in the last layer, whose residual the layers share. ``own`` (BLUE): a target found
by gradient in the first and one in the last layer; only these two are written. ``replay`` (FE): a target found in the
first layer; a pass with its deltas in place shows what the layers above would have had, which are their targets.
``successive``: a target found by gradient in each layer, on the model in which the layers below are written already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Construction = Literal["spread", "own", "replay", "successive"]


def delta_layers(layers: Sequence[int], construction: Construction) -> list[int]:
    """The layers in which targets are found by gradient, lowest first."""
    if construction == "spread":
        return [layers[-1]]
    if construction == "successive":
        return list(layers)
    return list(dict.fromkeys([layers[0], layers[-1]])) if construction == "own" else [layers[0]]


def early_layers(layers: Sequence[int], construction: Construction) -> list[int]:
    """Those of :func:`delta_layers` in which they are found before anything is written."""
    return [layers[0]] if construction == "successive" else delta_layers(layers, construction)


def target_layers(layers: Sequence[int], construction: Construction) -> list[int]:
    """The layers that have a target, lowest first; the last one is L."""
    return list(layers) if construction == "replay" else delta_layers(layers, construction)


def written_layers(layers: Sequence[int], construction: Construction) -> list[int]:
    """The layers that are written, lowest first."""
    return delta_layers(layers, construction) if construction == "own" else list(layers)

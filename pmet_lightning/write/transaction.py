"""All of an edit batch or nothing: the weights before it, and putting them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pmet_lightning.model.architectures import Place
from pmet_lightning.model.fsdp import is_finite, own_rows


@dataclass(frozen=True)
class Before:
    """What there was before an edit batch: each weight with its own rows then, ΔW so far, protected keys.

    An edit batch makes new sums and leaves the old ones as they are, so those here are no copies.
    """

    weights: list[tuple[Tensor, Tensor]]
    deltas: dict[str, Tensor]
    past: dict[Place, Tensor]


@contextmanager
def all_or_nothing(projections: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Put the weights back, bit by bit, if the block does not end well (an interrupt included)."""
    kept: list[tuple[Tensor, Tensor]] = [(p.weight, own_rows(p.weight).clone()) for p in projections]
    try:
        yield kept
        for weight, _ in kept:
            if not is_finite(weight):
                raise FloatingPointError("a written weight is not finite in its own precision")
    except BaseException:
        for weight, before in kept:
            own_rows(weight).copy_(before)
        raise

"""What a trainer holds: its callbacks by kind, the edits of its data module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import lightning as L

from pmet_lightning.data.records import Edit

Found = TypeVar("Found", bound=L.Callback)


def all_edits(trainer: L.Trainer) -> Sequence[Edit]:
    """The edits of the trainer's data module; empty if it has none."""
    return getattr(getattr(trainer, "datamodule", None), "edits", ())


def find_callback(trainer: L.Trainer, kind: type[Found]) -> Found | None:
    """The trainer's first callback of a kind."""
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]

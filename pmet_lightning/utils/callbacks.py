"""Look-ups on a trainer: its callbacks by type, and the edits of its data module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import lightning as L

Found = TypeVar("Found", bound=L.Callback)


def all_edits(trainer: L.Trainer) -> Sequence[Any]:
    """The edits of the trainer's data module; empty if it has none, or streams them."""
    return getattr(getattr(trainer, "datamodule", None), "edits", ())


def is_stream(trainer: L.Trainer) -> bool:
    """Whether the edits of the data module arrive during the run."""
    return bool(getattr(getattr(trainer, "datamodule", None), "stream", False))


def find_callback(trainer: L.Trainer, kind: type[Found]) -> Found | None:
    """The trainer's first callback of a type, or ``None``."""
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]

"""Progress bars, one at a time: targets in edits, layers, statistics, evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

Item = TypeVar("Item")


class EditProgressBar(TQDMProgressBar):
    """Lightning's bar for the evaluations only; the parts of an edit batch show bars of their own."""

    @property
    def sanity_check_description(self) -> str:
        """The validation before the first edit."""
        return "Before"

    @property
    def validation_description(self) -> str:
        """The validation after the last edit."""
        return "After"

    def init_train_tqdm(self) -> Tqdm:
        """No bar of the whole run: targets, layers and evaluations show one each, and there is one at a time."""
        return Tqdm(disable=True)

    def init_validation_tqdm(self) -> Tqdm:
        """The bar of an evaluation; Lightning's would leave a line for the bar of the run."""
        return Tqdm(desc=self.validation_description, disable=self.is_disabled, leave=False, dynamic_ncols=True)

    def track(self, items: Sequence[Item], description: str) -> Iterable[Item]:
        """A separate bar over some items."""
        return Tqdm(items, desc=description, leave=False, disable=self.is_disabled)  # type: ignore[no-any-return]


def track(trainer: L.Trainer, items: Sequence[Item], description: str) -> Iterable[Item]:
    """The items, with a progress bar if the trainer shows any."""
    bar = trainer.progress_bar_callback
    return bar.track(items, description) if isinstance(bar, EditProgressBar) else items


def numbered(trainer: L.Trainer, description: str, index: int) -> str:
    """The description of a bar of one edit batch, with its number if there are several."""
    count = trainer.num_training_batches
    if count == 1:
        return description
    return f"{description} {index + 1}" + (f"/{count}" if math.isfinite(count) else "")


def counter(trainer: L.Trainer, total: int | None, description: str, unit: str) -> Any:
    """A progress bar to advance with ``update(n)``, as a context manager; silent if the trainer shows none."""
    bar = trainer.progress_bar_callback
    disable = bar.is_disabled if isinstance(bar, EditProgressBar) else True
    return Tqdm(total=total, desc=description, unit=unit, unit_scale=True, leave=False, disable=disable)

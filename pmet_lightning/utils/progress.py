"""Progress bars: edits instead of batches, and separate bars for layers, statistics and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from pmet_lightning.utils.callbacks import all_edits

Item = TypeVar("Item")


class EditProgressBar(TQDMProgressBar):
    """Lightning's bar, which counts edits while targets are optimized and names each evaluation."""

    @property
    def sanity_check_description(self) -> str:
        """The validation before the first edit."""
        return "Before"

    @property
    def validation_description(self) -> str:
        """The validation after the last edit."""
        return "After"

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Count edits, not edit batches."""
        super().on_train_epoch_start(trainer, *_)
        self.train_progress_bar.reset(len(all_edits(trainer)) or None)
        self.train_progress_bar.unit = "edit"
        self.train_progress_bar.set_description("Targets")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance by the edits of the edit batch."""
        if not self.train_progress_bar.disable:
            self.train_progress_bar.update(len(batch.edits))
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def track(self, items: Sequence[Item], description: str) -> Iterable[Item]:
        """A separate bar over some items."""
        return Tqdm(items, desc=description, leave=False, disable=self.is_disabled)  # type: ignore[no-any-return]


def track(trainer: L.Trainer, items: Sequence[Item], description: str) -> Iterable[Item]:
    """The items, with a progress bar if the trainer shows any."""
    bar = trainer.progress_bar_callback
    return bar.track(items, description) if isinstance(bar, EditProgressBar) else items


def counter(trainer: L.Trainer, total: int | None, description: str, unit: str) -> Any:
    """A progress bar to advance with ``update(n)``, as a context manager; silent if the trainer shows none."""
    bar = trainer.progress_bar_callback
    disable = bar.is_disabled if isinstance(bar, EditProgressBar) else True
    return Tqdm(total=total, desc=description, unit=unit, unit_scale=True, leave=False, disable=disable)

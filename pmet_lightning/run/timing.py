"""Where the time of a run goes: seconds of its phases, by Lightning's own hooks."""

from __future__ import annotations

import time
from typing import Any

import lightning as L


class PhaseClock(L.Callback):
    """Adds up the seconds of each phase of a fit; every second since :meth:`start` belongs to one of them.

    It is the first callback, and the recorder, which ends phases too, the last but the inspection: between the two lies
    what the other callbacks do in a hook. The phases are ``records`` (read and checked), ``model`` (loaded),
    ``moments`` (found or collected), ``contexts``, ``before`` (evaluation), ``targets`` (or all of a fine-tuning),
    ``spread``, ``ledger`` (with the patch), ``after`` (evaluation, that of each edit batch too) and ``report`` (its
    figures, and what the loggers show of an edit batch).
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = 0.0

    def start(self) -> None:
        """Begin anew."""
        self.seconds, self._since = {}, time.perf_counter()

    def end(self, phase: str) -> None:
        """Say that what was done until now, since the last call, was part of a phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The data module has read the records."""
        self.end("records")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The model is there."""
        self.end("model")

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The module has its contexts."""
        self.end("contexts")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same, where nothing is evaluated before."""
        self.end("contexts")

    def on_train_batch_end(self, *_: Any) -> None:
        """An edit batch has its targets."""
        self.end("targets")

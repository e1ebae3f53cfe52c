"""Where the time of a run goes, by what Lightning's profiler is told anyway."""

from __future__ import annotations

import re
import time
from functools import cache

from lightning.pytorch.profilers import Profiler

# In this order in the report. What matches none of them is 'other', and so is what lies between actions.
_PHASES = {
    "records": r"\[LightningDataModule\]\w+\.setup|\[_TrainingEpochLoop\]\.train_dataloader_next",
    "model": r"\[LightningModule\]\w+\.(setup|configure_model)",
    "moments": r"\[Callback\]SecondMoments\b.*\.on_fit_start",
    "contexts": r"\[LightningModule\]\w+\.on_fit_start",
    "before": "before",
    "targets": r"\[Strategy\]\w+\.training_step",
    "spread": r"\[Callback\](WeightSpread|Drift)\b.*\.on_train_batch_end",
    "ledger": r"\[Callback\](EditLedger|RunRecorder)\b.*\.on_train_batch_end",
    "after": "after",
    "report": "report",
}


class PhaseProfiler(Profiler):
    """Adds up the seconds of each phase of a fit.

    The phases are ``records`` (read and checked), ``model`` (loaded), ``moments`` (found or collected), ``contexts``,
    ``before`` (evaluation, of a stream that of each edit batch), ``targets`` (or all of a fine-tuning), ``spread``
    (with the limits on drift), ``ledger`` (with journal and patch), ``after`` (evaluation, that of each edit batch
    too) and ``report`` (its figures, and what the loggers show of an edit batch).
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(_PHASES, 0.0)
        self._since: dict[str, float] = {}
        self._begun = time.perf_counter()

    def restart(self) -> None:
        """Begin at zero."""
        self.seconds, self._since, self._begun = dict.fromkeys(_PHASES, 0.0), {}, time.perf_counter()

    def start(self, action_name: str) -> None:
        """An action begins."""
        self._since[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """An action ends; its time is its phase's."""
        since, phase = self._since.pop(action_name, None), _phase_of(action_name)
        if since is not None and phase is not None:
            self.seconds[phase] += time.perf_counter() - since

    def phases(self) -> dict[str, float]:
        """Seconds of each phase until now, and of everything else (``other``)."""
        total = time.perf_counter() - self._begun
        return {**self.seconds, "other": max(0.0, total - sum(self.seconds.values()))}


@cache
def _phase_of(action: str) -> str | None:
    return next((phase for phase, pattern in _PHASES.items() if re.fullmatch(pattern, action)), None)

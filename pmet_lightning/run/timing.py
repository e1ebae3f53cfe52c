"""How long each phase of a run takes, from the actions that Lightning reports to its profiler."""

from __future__ import annotations

import re
import time
from functools import cache

from lightning.pytorch.profilers import Profiler

# In the order of the report. What matches none of them, or lies between actions, is 'other'.
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
    ``before`` (evaluation; for a stream, that of each edit batch), ``targets`` (or all of a fine-tuning), ``spread``
    (with successive targets after the first, and the limits on drift), ``ledger`` (with journal and patch), ``after``
    (evaluation, also that of each edit batch) and ``report`` (its figures, and what is logged of an edit batch).
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(_PHASES, 0.0)
        self._since: dict[str, float] = {}
        self._begun = time.perf_counter()

    def restart(self) -> None:
        """Reset all times to zero."""
        self.seconds, self._since, self._begun = dict.fromkeys(_PHASES, 0.0), {}, time.perf_counter()

    def start(self, action_name: str) -> None:
        """Note the start of an action."""
        self._since[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Add the time of an action that ends to its phase."""
        since, phase = self._since.pop(action_name, None), _phase_of(action_name)
        if since is not None and phase is not None:
            self.seconds[phase] += time.perf_counter() - since

    def phases(self) -> dict[str, float]:
        """Seconds of each phase so far, and of everything else (``other``)."""
        total = time.perf_counter() - self._begun
        return {**self.seconds, "other": max(0.0, total - sum(self.seconds.values()))}


@cache
def _phase_of(action: str) -> str | None:
    return next((phase for phase, pattern in _PHASES.items() if re.fullmatch(pattern, action)), None)

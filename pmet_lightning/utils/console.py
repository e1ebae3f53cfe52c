"""What appears in the terminal: log messages that do not break into a progress bar, no noise of other packages."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Their messages below a warning are about themselves: TPUs that are not there, a product to install, epochs.
_NOISY = ("lightning", "lightning.pytorch", "lightning.fabric")
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # as Lightning reads them


class BarSafeHandler(logging.StreamHandler):
    """Writes messages to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        bars = sys.modules.get("tqdm")  # not imported: no bar can be there
        if bars is None or not bars.tqdm._instances:
            super().emit(record)
            return
        try:
            bars.tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


def start_log() -> None:
    """Show log messages without a prefix; of several processes, only the first shows information."""
    rank = next((int(os.environ[name]) for name in _RANKS if os.environ.get(name, "").isdigit()), 0)
    handler = BarSafeHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, handlers=[handler])


def quieten() -> None:
    """Leave of Lightning's messages the warnings, shown once and as our own; call it after Lightning's import."""
    for name in _NOISY:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the lines and bars of single runs out of the log of what runs them, but for warnings."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    ours = logging.getLogger("pmet_lightning")
    level = ours.level
    ours.setLevel(logging.WARNING)
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()
        ours.setLevel(level)


@contextmanager
def warned_once() -> Iterator[None]:
    """Show each warning once, where several runs read the same records."""
    handlers = [(handler, _Once()) for handler in logging.getLogger().handlers]
    for handler, once in handlers:
        handler.addFilter(once)
    try:
        yield
    finally:
        for handler, once in handlers:
            handler.removeFilter(once)


class _Once(logging.Filter):
    """Holds back a warning that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_new = record.levelno < logging.WARNING or text not in self._seen
        self._seen.add(text)
        return is_new

"""Progress of a command without a trainer: a bar on a terminal, and lines of the log where the output is a file."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

SECONDS = 30.0  # between two lines of a log
_LINE = "{desc}: {percentage:.0f} %, {elapsed} passed, {remaining} left"


class LogBar(tqdm):  # type: ignore[misc]
    """A bar of tqdm that logs a line from time to time instead of drawing itself.

    Args:
        total: Number of steps.
        desc: What they belong to.
        seconds: Time before the first line and between two lines.
    """

    def __init__(self, total: int, desc: str, seconds: float = SECONDS) -> None:
        super().__init__(
            total=total, desc=desc, leave=False, file=io.StringIO(), bar_format=_LINE, miniters=1,
            mininterval=seconds, maxinterval=seconds, delay=seconds,
        )  # fmt: skip

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Log the line; an empty message, with which tqdm wipes a bar away, is not logged."""
        if msg is None:
            log.info("%s", str(self))
        return True


def progress(total: int, description: str) -> Any:
    """Progress to advance with ``update(n)``, as a context manager.

    Args:
        total: Number of steps.
        description: What they belong to.
    """
    if sys.stderr.isatty():
        return tqdm(total=total, desc=description, leave=False, bar_format="{l_bar}{bar}| {elapsed}<{remaining}")
    return LogBar(total, description)

"""A run that is ended from outside: at once on SIGTERM as on Ctrl-C, with a last line on what is kept."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

_CODE = 128  # plus the number of the signal: the exit code by convention


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program is: Lightning itself would wait for the end of the edit batch."""


@contextmanager
def ends_with(message: Callable[[], str]) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM end the block at once, with a last line in the log and the conventional exit code.

    Args:
        message: Gives the last line, once the block has ended.

    Raises:
        SystemExit: With code 130 after Ctrl-C, 143 after SIGTERM.
    """
    in_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    before = signal.signal(signal.SIGTERM, _terminate) if in_main else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning makes SystemExit(1) of a KeyboardInterrupt, after its callbacks have seen it.
        cause = error if isinstance(error, KeyboardInterrupt) else error.__context__
        if not isinstance(cause, KeyboardInterrupt):
            raise
        log.warning("%s", message())
        number = signal.SIGTERM if isinstance(cause, Terminated) else signal.SIGINT
        raise SystemExit(_CODE + number) from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what ends the run must not be ended itself
    raise Terminated

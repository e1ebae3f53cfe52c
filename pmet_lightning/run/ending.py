"""A run that is ended from outside: at once on SIGTERM as on Ctrl-C, with a last line on what is kept."""

from __future__ import annotations

import _thread
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

log = logging.getLogger(__name__)

_CODE = 128  # plus the number of the signal: the exit code by convention
_AGAIN = 0.1  # seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program is: Lightning itself would wait for the end of the edit batch."""


@contextmanager
def ends_with(message: Callable[[], str]) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM end the block at once, with a last line in the log and the conventional exit code.

    Python drops what is raised in a callback of the garbage collector; there the signal is repeated a little later.

    Args:
        message: Gives the last line, once the block has ended.

    Raises:
        SystemExit: With code 130 after Ctrl-C, 143 after SIGTERM.
    """
    in_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    before = signal.signal(signal.SIGTERM, _terminate) if in_main else None
    hook = sys.unraisablehook
    sys.unraisablehook = partial(_repeat, hook)
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
        sys.unraisablehook = hook
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what ends the run must not be ended itself
    raise Terminated


def _repeat(otherwise: Callable[[Any], None], dropped: Any) -> None:
    """Send a signal again whose exception was dropped; not at once, as this would be dropped like it."""
    error = dropped.exc_value
    if not isinstance(error, KeyboardInterrupt):
        otherwise(dropped)
        return
    number = signal.SIGINT
    if isinstance(error, Terminated):
        number = signal.SIGTERM
        signal.signal(number, _terminate)
    threading.Timer(_AGAIN, _thread.interrupt_main, [number]).start()

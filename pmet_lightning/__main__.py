"""``python -m pmet_lightning``."""

from __future__ import annotations

import logging
import sys
import threading

log = logging.getLogger("pmet_lightning")

# Errors that the user can fix: shown as a message, without a traceback.
_EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)  # ImportError: an extra is not installed


def main() -> None:
    """Run a command; an error that the user can fix ends in one message and exit code 2."""
    from pmet_lightning.cli.dispatch import main as run

    threading.excepthook = _log_thread_error
    try:
        run()
    except _EXPECTED as error:
        logging.basicConfig(format="%(message)s")  # unless the command has begun, and done so
        log.error("error: %s", error)
        log.debug("traceback", exc_info=True)
        sys.exit(2)
    except KeyboardInterrupt:
        log.error("interrupted: nothing was changed")
        sys.exit(130)  # by convention 128 and the number of the signal


def _log_thread_error(arguments: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own; the run meets the same error, such as a full disk, by itself."""
    if arguments.exc_type is not None and issubclass(arguments.exc_type, _EXPECTED):
        log.debug("in a thread: %s", arguments.exc_value)
    else:
        threading.__excepthook__(arguments)


if __name__ == "__main__":
    main()

"""``python -m pmet_lightning``."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("pmet_lightning")

# Errors that the user can fix: shown as a message, without a traceback.
_EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)  # ImportError: an extra is not installed


def main() -> None:
    """Run a command; an error that the user can fix ends in one message and exit code 2."""
    from pmet_lightning.cli.dispatch import main as run

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


if __name__ == "__main__":
    main()

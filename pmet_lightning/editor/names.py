"""Errors and log lines of the editor name its arguments, not the options of the command line that mean the same."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGE = "pmet_lightning."
_OPTION = re.compile(r"--(model|data|moments|spread|drift|trainer)\.(\w+)(?: (true|false|null)\b)?")
_VALUES = {"true": "True", "false": "False", "null": "None"}
# Arguments of their own, under another name than that of their setting or from another section than 'model'.
_OWN = {
    "model.model_name": "model",
    "data.path": "facts",
    "data.edit_batch": "edit_batch",
    "moments.corpus": "corpus",
    "spread.lam": "lam",
    "trainer.run_dir": "run_dir",
}


@contextmanager
def arguments_named() -> Iterator[None]:
    """In the block, or in a function decorated with it, have errors name the editor's arguments."""
    try:
        yield
    except Exception as error:
        error.args = tuple(as_arguments(part) if isinstance(part, str) else part for part in error.args)
        raise


@contextmanager
def arguments_named_in_logs() -> Iterator[None]:
    """In the block, have this package's log lines name the editor's arguments."""
    loggers = [logging.getLogger(name) for name in [*logging.root.manager.loggerDict] if name.startswith(_PACKAGE)]
    for logger in loggers:
        logger.addFilter(_rename)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_rename)


def _rename(record: logging.LogRecord) -> bool:
    record.msg, record.args = as_arguments(record.getMessage()), ()
    return True


def as_arguments(text: str) -> str:
    """A text with the options in it replaced: ``--model.clamp`` by ``clamp``, ``--data.skip`` by ``data={'skip': …}``.

    Args:
        text: Any text.
    """
    return _OPTION.sub(_as_argument, text)


def _as_argument(match: re.Match[str]) -> str:
    section, name, value = match.groups()
    own = _OWN.get(f"{section}.{name}", name if section == "model" else None)
    if own is not None:
        return own if value is None else f"{own}={_VALUES[value]}"
    return f"{section}={{'{name}': {'…' if value is None else _VALUES[value]}}}"

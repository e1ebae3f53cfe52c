"""The base class of the package's own errors."""

from __future__ import annotations


class PmetError(ValueError):
    """An error that the user can fix: an input, a file, or a model that does not fit.

    The message names what and where, what was expected, and what to do. It is a ``ValueError``, so that programs that
    catch those continue to work.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

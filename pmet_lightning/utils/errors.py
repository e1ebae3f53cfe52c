"""The base class of all errors that are the package's own."""

from __future__ import annotations


class PmetError(ValueError):
    """Something that the user can mend: an input, a file, or a model that does not fit.

    The message names what and where, what was expected, and what to do. It is a ``ValueError``, so that programs that
    catch those go on working.
    """

"""Whether the Hugging Face hub can be reached: without a network, its library tries each file for 25 seconds."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

_SECONDS = 10.0
_PORTS = {"https": 443, "http": 80}


def unreachable() -> str | None:
    """Why the hub cannot be reached; ``None`` if it can, or if a proxy leads to it."""
    where = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if getproxies() or where.hostname is None:
        return None
    try:
        socket.create_connection((where.hostname, where.port or _PORTS.get(where.scheme, 443)), _SECONDS).close()
    except OSError as error:
        return f"{where.hostname} cannot be reached: {error.strerror or error}"
    return None


def check_reachable() -> None:
    """Raise at once what would otherwise take 25 seconds of attempts.

    Raises:
        ConnectionError: If the hub cannot be reached.
    """
    reason = unreachable()
    if reason is not None:
        raise ConnectionError(reason)


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """In the block, have the library use its cache only, if the hub cannot be reached."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or unreachable() is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False

"""Versions of the packages that affect the numbers."""

from __future__ import annotations

import importlib.metadata
import platform

_PACKAGES = ("pmet-lightning", "torch", "lightning", "transformers", "torchmetrics")


def versions() -> dict[str, str]:
    """Versions of the packages that affect the numbers, and of Python."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}

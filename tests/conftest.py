"""Shared fixtures: where the optional real inputs lie, tiny models, and what every test leaves behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("PMET_SHARED", ROOT.parent / "shared"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real records, tokenizers, models and golden numbers; they are not part of the project."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"no real inputs at {SHARED}")
    return SHARED


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)

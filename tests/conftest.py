"""Shared fixtures: where the optional real inputs lie, tiny models, and what every test leaves."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: several processes whose threads spin slow each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("PMET_SHARED", ROOT.parent / "shared"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Lightning 2.6 calls what jsonargparse 4.49 has deprecated; this is the switch that jsonargparse has for it.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def mostly_slow(names: Iterable[Any], default: Iterable[Any]) -> list[Any]:
    """Parameters of which some are checked in the default tier, and the others in the slow one."""
    fast = set(default)
    return [name if name in fast else pytest.param(*_tuple(name), marks=pytest.mark.slow) for name in names]


def _tuple(name: Any) -> tuple[Any, ...]:
    return name if isinstance(name, tuple) else (name,)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real records, tokenizers, models and golden numbers; they are not part of the project."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"no real inputs at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """Gives a tiny model of a family, its sites and its tokenizer; nobody changes its weights."""
    # Imported after the settings above.
    from pmet_lightning.data.encoder import load_tokenizer
    from pmet_lightning.model.architectures import architecture_of
    from pmet_lightning.model.loading import load_config, load_model
    from pmet_lightning.model.projections import Sites
    from tests.tiny import save_tiny

    made: dict = {}

    def get(family: str, window: int | None = None):
        if (family, window) not in made:
            folder = save_tiny(family, tmp_path_factory.mktemp(family), window=window)
            model = load_model(folder, "float32")
            sites = Sites.of(model, architecture_of(load_config(folder)))
            made[family, window] = model, sites, load_tokenizer(folder)
        return made[family, window]

    return get


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)

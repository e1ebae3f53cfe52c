"""Edit facts in language models with PMET, as a PyTorch Lightning pipeline."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("pmet-lightning")

if TYPE_CHECKING:
    from pmet_lightning.data import EditDataModule as EditDataModule
    from pmet_lightning.editor import Editor as Editor
    from pmet_lightning.editor_report import EditReport as EditReport
    from pmet_lightning.edits import Edit as Edit
    from pmet_lightning.edits import read_edits as read_edits
    from pmet_lightning.metrics import EditScores as EditScores
    from pmet_lightning.module import TargetOptimizer as TargetOptimizer
    from pmet_lightning.spread import WeightSpread as WeightSpread
    from pmet_lightning.stats import SecondMoments as SecondMoments
else:
    _HOMES = {
        "EditDataModule": "data",
        "Editor": "editor",
        "EditReport": "editor_report",
        "Edit": "edits",
        "read_edits": "edits",
        "EditScores": "metrics",
        "TargetOptimizer": "module",
        "WeightSpread": "spread",
        "SecondMoments": "stats",
    }

    def __getattr__(name: str) -> Any:
        """A public name, imported when it is first asked for: torch and Lightning take seconds (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})

"""Edit facts in language models with PMET, as a PyTorch Lightning pipeline."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("pmet-lightning")

if TYPE_CHECKING:
    from pmet_lightning.data.datamodule import EditDataModule as EditDataModule
    from pmet_lightning.data.readers import read_edits as read_edits
    from pmet_lightning.data.records import Edit as Edit
    from pmet_lightning.editor.edit_report import EditReport as EditReport
    from pmet_lightning.editor.editor import Editor as Editor
    from pmet_lightning.evaluation.scores import EditScores as EditScores
    from pmet_lightning.moments.second_moments import SecondMoments as SecondMoments
    from pmet_lightning.targets.target_optimizer import TargetOptimizer as TargetOptimizer
    from pmet_lightning.write.weight_spread import WeightSpread as WeightSpread
else:
    _HOMES = {
        "EditDataModule": "data.datamodule",
        "Editor": "editor.editor",
        "EditReport": "editor.edit_report",
        "Edit": "data.records",
        "read_edits": "data.readers",
        "EditScores": "evaluation.scores",
        "TargetOptimizer": "targets.target_optimizer",
        "WeightSpread": "write.weight_spread",
        "SecondMoments": "moments.second_moments",
    }

    def __getattr__(name: str) -> Any:
        """A public name, imported when it is first asked for: torch and Lightning take seconds (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})

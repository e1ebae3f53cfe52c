"""Edit facts in language models with PMET, as a PyTorch Lightning pipeline."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("pmet-lightning")

if TYPE_CHECKING:
    from pmet_lightning.baselines.finetuning import FineTuning as FineTuning
    from pmet_lightning.data.corpus import CorpusError as CorpusError
    from pmet_lightning.data.datamodule import EditDataModule as EditDataModule
    from pmet_lightning.data.encoder import LocationError as LocationError
    from pmet_lightning.data.fields import RecordError as RecordError
    from pmet_lightning.data.readers import as_edits as as_edits
    from pmet_lightning.data.readers import read_edits as read_edits
    from pmet_lightning.data.records import Edit as Edit
    from pmet_lightning.data.records import Probe as Probe
    from pmet_lightning.data.vocabulary import VocabularyError as VocabularyError
    from pmet_lightning.editor.edit_report import EditReport as EditReport
    from pmet_lightning.editor.editor import Editor as Editor
    from pmet_lightning.evaluation.scores import EditScores as EditScores
    from pmet_lightning.model.architectures import Architecture as Architecture
    from pmet_lightning.model.architectures import UnknownArchitectureError as UnknownArchitectureError
    from pmet_lightning.model.patch import PatchError as PatchError
    from pmet_lightning.model.patch import apply_patch as apply_patch
    from pmet_lightning.model.patch import load_patch as load_patch
    from pmet_lightning.model.patch import save_patch as save_patch
    from pmet_lightning.moments.second_moments import SecondMoments as SecondMoments
    from pmet_lightning.moments.store import MomentError as MomentError
    from pmet_lightning.run.lightning_cli import build_fit as build_fit
    from pmet_lightning.run.lightning_cli import run_fit as run_fit
    from pmet_lightning.run.trainer import EditTrainer as EditTrainer
    from pmet_lightning.targets.target_optimizer import TargetOptimizer as TargetOptimizer
    from pmet_lightning.utils.errors import PmetError as PmetError
    from pmet_lightning.write.drift import Drift as Drift
    from pmet_lightning.write.weight_spread import WeightSpread as WeightSpread

_MODULES = {
    "Architecture": "model.architectures",
    "CorpusError": "data.corpus",
    "Drift": "write.drift",
    "Edit": "data.records",
    "EditDataModule": "data.datamodule",
    "EditReport": "editor.edit_report",
    "EditScores": "evaluation.scores",
    "EditTrainer": "run.trainer",
    "Editor": "editor.editor",
    "FineTuning": "baselines.finetuning",
    "LocationError": "data.encoder",
    "MomentError": "moments.store",
    "PatchError": "model.patch",
    "PmetError": "utils.errors",
    "Probe": "data.records",
    "RecordError": "data.fields",
    "SecondMoments": "moments.second_moments",
    "TargetOptimizer": "targets.target_optimizer",
    "UnknownArchitectureError": "model.architectures",
    "VocabularyError": "data.vocabulary",
    "WeightSpread": "write.weight_spread",
    "apply_patch": "model.patch",
    "as_edits": "data.readers",
    "build_fit": "run.lightning_cli",
    "load_patch": "model.patch",
    "read_edits": "data.readers",
    "run_fit": "run.lightning_cli",
    "save_patch": "model.patch",
}

__all__ = ["__version__", *_MODULES]  # noqa: PLE0604

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a public name on first access (PEP 562): importing torch and Lightning takes seconds."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})

"""Edit facts in language models with PMET, as a PyTorch Lightning pipeline."""

from importlib.metadata import version

from pmet_lightning.data import EditDataModule as EditDataModule
from pmet_lightning.edits import Edit as Edit
from pmet_lightning.edits import read_edits as read_edits
from pmet_lightning.metrics import EditScores as EditScores
from pmet_lightning.module import TargetOptimizer as TargetOptimizer
from pmet_lightning.spread import WeightSpread as WeightSpread
from pmet_lightning.stats import SecondMoments as SecondMoments

__version__ = version("pmet-lightning")

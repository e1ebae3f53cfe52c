"""How well edits took, and what else they changed (EVALUATION.md)."""

from pmet_lightning.metrics.functional import ProbeResult as ProbeResult
from pmet_lightning.metrics.functional import RecordResult as RecordResult
from pmet_lightning.metrics.functional import compared as compared
from pmet_lightning.metrics.functional import harmonic_mean as harmonic_mean
from pmet_lightning.metrics.functional import score_probes as score_probes
from pmet_lightning.metrics.scores import METRICS as METRICS
from pmet_lightning.metrics.scores import EditScores as EditScores

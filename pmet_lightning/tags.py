"""Groups of the figures that a run logs; the numbers put TensorBoard's page in the order of the run's story."""

from __future__ import annotations

from typing import Final

SCORES: Final = "1_scores"  # of all records, before and after
STEPS: Final = "2_targets"  # by the optimisation step of an edit
EDIT_BATCHES: Final = "3_edit_batches"  # what became of each
WRITES: Final = "4_writes"  # each written layer
HISTOGRAMS: Final = "5_histograms"
FIGURES: Final = "6_figures"
NUMERICS: Final = "7_numerics"  # of each written layer
QUANTILES: Final = "8_quantiles"  # over the edits, by step
DETAILS: Final = "9_details"  # all other scores
LIVE: Final = "9_live"  # while targets are being found
TEXTS: Final = "answers"

FINETUNING: Final = "2_finetuning"  # the baseline's epochs

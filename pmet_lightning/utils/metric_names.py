"""Groups of the figures that a run logs; the numbers put TensorBoard's page in the order of the run's story."""

from __future__ import annotations

from typing import Final

SCORES: Final = "1_scores"  # of all records, before and after
STEPS: Final = "2_targets"  # by the optimization step of an edit
EDIT_BATCHES: Final = "3_edit_batches"  # what became of each
WRITES: Final = "4_writes"  # from write to write
LAYERS: Final = "5_layers"  # each layer from edit batch to edit batch
FIGURES: Final = "6_figures"
HISTOGRAMS: Final = "7_histograms"
NUMERICS: Final = "8_numerics"  # of each layer
ACTIVE: Final = "9_active"  # by step, over the edits that took it
DETAILS: Final = "9_details"  # all other scores
LIVE: Final = "9_live"  # while targets are being found
QUANTILES: Final = "9_quantiles"  # over the edits, by step
TEXTS: Final = "answers"

FINETUNING: Final = "2_finetuning"  # the baseline's epochs

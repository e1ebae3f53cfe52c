"""Groups of the metrics that a run logs; the numbers sort them on TensorBoard's page, from results to details."""

from __future__ import annotations

from typing import Final

SCORES: Final = "1_scores"  # of all records, after the last edit
STEPS: Final = "2_targets"  # by optimization step of an edit
EDIT_BATCHES: Final = "3_edit_batches"  # results of each edit batch
WRITES: Final = "4_writes"  # from write to write
LAYERS: Final = "5_layers"  # of each layer, from edit batch to edit batch
FIGURES: Final = "6_figures"
HISTOGRAMS: Final = "7_histograms"
NUMERICS: Final = "8_numerics"  # of each layer
ACTIVE: Final = "9_active"  # by step, over the edits active in it
BEFORE: Final = "9_before"  # all scores of the unedited model: a chart of one point each, which no smoothing can move
DETAILS: Final = "9_details"  # all other scores
LIVE: Final = "9_live"  # while targets are being optimized
QUANTILES: Final = "9_quantiles"  # over the edits, by step
TEXTS: Final = "answers"
SCORE_TABLE: Final = "scores"

FINETUNING: Final = "2_finetuning"  # the baseline's epochs

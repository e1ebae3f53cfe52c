"""The layers that ``analyze`` proposes beside the Scores of editing one range of layers after the other.

    python benchmarks/layers.py [--records atlas-tuning] [--limit 100] [--layers "[0]" "[0,1]"] [--facts 100]

Every range gets the settings of configs/pmet.yaml, which were chosen for layers 0 to 2: a range for which others would
be better is at a disadvantage. The proposal is made on the same records, from the unedited model alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

from pmet_lightning.analysis.verb import DataOptions, ModelOptions, analyze
from pmet_lightning.comparison import Method, quiet_run
from pmet_lightning.metrics import METRICS
from pmet_lightning.score_lines import score_cell

_PARTS = ("effect", "lead")
RANGES = (
    "[0]", "[1]", "[2]", "[3]", "[4]", "[0,1]", "[1,2]", "[2,3]", "[0,1,2]", "[1,2,3]", "[2,3,4]", "[0,1,2,3]",
    "[0,1,2,3,4]",
)  # fmt: skip


def proposal_line(records: str, facts: int, base: str) -> str:
    """What is proposed, and how sure that is."""
    analyze(f"{base}/analysis", ModelOptions(device="cpu"), DataOptions(records, limit=facts))
    known = json.loads(Path(f"{base}/analysis/analysis.json").read_text(encoding="utf-8"))
    found = known["proposals"]["before"]
    effect, lead = (f"{part['mean']:.3f} [{part['low']:.3f}, {part['high']:.3f}]" for part in map(found.get, _PARTS))
    return (
        f"proposed from {found['effect']['count']} facts: layers {found['layers']} ({found['verdict']}; "
        f"{found['same_layers']:.0%} of resamples), effect {effect}, {lead} above the next layer\n\n"
    )


def main() -> None:
    """Propose, then sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", default="atlas-tuning")
    parser.add_argument("--limit", type=int, default=100, help="edits, in one edit batch")
    parser.add_argument("--layers", nargs="+", default=list(RANGES))
    parser.add_argument("--facts", type=int, default=100, help="facts of the proposal; 0 leaves it out")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    out = sys.stdout.write
    with tempfile.TemporaryDirectory() as base:
        if options.facts:
            out(proposal_line(options.records, options.facts, base))
        out(f"{options.limit} edits of {options.records}, seed 0\n\n")
        out("| layers | " + " | ".join(METRICS) + " |\n" + "|---" * (len(METRICS) + 1) + "|\n")
        for number, layers in enumerate(options.layers):
            changes = {
                "model.layers": json.loads(layers), "data.path": options.records, "data.limit": options.limit,
                "model.free_tokens": 0, "drift.text": None, "model.targets_folder": f"{base}/targets",
            }  # fmt: skip
            table = quiet_run(Method(), changes, Path(base) / str(number))["scores"]["after"]
            out(f"| {layers} | {' | '.join(score_cell(table, metric) for metric in METRICS)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

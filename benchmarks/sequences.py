"""Many edit batches one after the other compared with one; with and without protected past keys and projection.

    python -m pmet_lightning demo --edits 1050 --out /tmp/atlas1050      # about ten minutes
    python benchmarks/sequences.py /tmp/atlas1050

λ of each variant is chosen on the 400 records of the shipped `atlas-tuning` and the shipped model (eight edit batches
of 50, or one of 400): the highest Score. The table is made on the larger world: 20 edit batches of 50, or one of 1,000.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from pmet_lightning.compare.plan import quiet, read_report
from pmet_lightning.evaluation.scores import METRICS
from pmet_lightning.report.tables import score_cell
from pmet_lightning.run.lightning_cli import run_fit

BATCH = {"data.edit_batch": 50, "spread.protect_past": False}
PROTECT, PROJECT = {"spread.protect_past": True}, {"spread.null_space": 0.03}
REPLAY = {"spread.targets": "replay", "model.optimize": "ffn", "model.clamp": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "one edit batch": {},
    "20 edit batches": BATCH,
    "past keys protected": BATCH | PROTECT,
    "null space": BATCH | PROJECT,
    "both": BATCH | PROTECT | PROJECT,
    "replay, past keys protected": BATCH | PROTECT | REPLAY,
}


def run(options: dict[str, Any]) -> dict[str, Any]:
    """The report of one run."""
    with tempfile.TemporaryDirectory() as base:
        settings = quiet({"model.free_tokens": 0, **options}, Path(base) / "run")
        return read_report(run_fit("pmet.yaml", settings))


def chosen(way: dict[str, Any], lams: list[float]) -> float:
    """The λ with the highest Score on the tuning records."""
    common = {"data.path": "atlas-tuning", "drift.text": None, **way}
    scores = {lam: run({**common, "spread.lam": lam})["scores"]["after"]["score"] for lam in lams}
    return max(scores, key=scores.__getitem__)


def main() -> None:
    """Choose λ of every variant, and report its result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", type=Path, help="a folder made by the command demo with 1,000 records at least")
    parser.add_argument(
        "--lam", nargs="+", type=float, default=[300, 1000, 3000], help="values tried for several edit batches"
    )
    parser.add_argument(
        "--lam_one", nargs="+", type=float, default=[50, 300, 1000], help="values tried for one edit batch"
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args()
    logging.disable(logging.INFO)
    out = sys.stdout.write
    corpus = str(options.world / "corpus.txt")
    world = {
        "data.path": [str(options.world / f"{name}.json") for name in ("records", "spare", "tuning")],
        "data.limit": 1000,
        "model.model_name": str(options.world / "model"),
        "moments.corpus": corpus,
        "drift.text": corpus,
    }
    out("| | λ | " + " | ".join(METRICS) + " | perplexity | growth |\n" + "|---" * (len(METRICS) + 4) + "|\n")
    for name in options.ways:
        way = WAYS[name]
        lam = chosen(way, options.lam if way else options.lam_one)
        report = run({**world, **way, "spread.lam": lam})
        before, after = report["scores"]["before"], report["scores"]["after"]
        cells = " | ".join(score_cell(after, metric) for metric in METRICS)
        growth = max(layer["growth"] for layer in report["layers"])
        out(f"| {name} | {lam:g} | {cells} | {after['perplexity'] / before['perplexity']:.2f} | {growth:.1f} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

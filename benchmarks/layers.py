"""The layers that ``analyze`` proposes, and the Scores of editing each of several ranges of layers.

    python benchmarks/layers.py [--records atlas-tuning] [--limit 100] [--layers "[0]" "[0,1]"] [--facts 100]
    python -m pmet_lightning demo --architecture llama --out llama      # about ten minutes
    python benchmarks/layers.py --model llama --settings model.optimize=ffn model.clamp=2

Every range gets the same settings: those of configs/pmet.yaml, which were chosen for layers 0 to 2 of the shipped
Atlas, and --settings. A range for which others would be better is at a disadvantage. The proposal is made on the same
records, from the unedited model alone, and is the first range edited; "to the proposal" is the difference of the Scores
by a paired bootstrap over records.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from pmet_lightning.analysis.command import DataOptions, ModelOptions, analyze
from pmet_lightning.compare.plan import quiet, read_report
from pmet_lightning.compare.results import edit_rows
from pmet_lightning.evaluation.scores import METRICS, score_difference
from pmet_lightning.report.tables import score_cell
from pmet_lightning.run.lightning_cli import run_fit

_PARTS = ("effect", "lead")
RANGES = (
    "[0]", "[1]", "[2]", "[3]", "[4]", "[0,1]", "[1,2]", "[2,3]", "[0,1,2]", "[1,2,3]", "[2,3,4]", "[0,1,2,3]",
    "[0,1,2,3,4]",
)  # fmt: skip


def proposal(model: str, records: str, facts: int, base: str) -> tuple[list[int], str]:
    """The proposed layers, and a line that says how sure the proposal is."""
    analyze(f"{base}/analysis", ModelOptions(model, device="cpu"), DataOptions(records, limit=facts))
    analysis = json.loads(Path(f"{base}/analysis/analysis.json").read_text(encoding="utf-8"))
    found = analysis["proposals"]["before"]
    effect, lead = (f"{part['mean']:.3f} [{part['low']:.3f}, {part['high']:.3f}]" for part in map(found.get, _PARTS))
    return found["layers"], (
        f"proposed from {found['effect']['count']} facts: layers {found['layers']} ({found['verdict']}; "
        f"{found['same_layers']:.0%} of resamples), effect {effect}, {lead} above the next layer\n\n"
    )


def source(options: argparse.Namespace) -> dict[str, Any]:
    """Model, records and corpus as options of a run."""
    if options.model is None:
        return {"data.path": options.records}
    return {
        "model.model_name": f"{options.model}/model",
        "data.path": f"{options.model}/tuning.json",
        "moments.corpus": f"{options.model}/corpus.txt",
    }


def ranges(options: argparse.Namespace, first: list[int]) -> list[list[int]]:
    """The ranges to edit, the proposal first."""
    rest = [layers for layers in map(json.loads, options.layers) if layers != first]
    return [first, *rest] if first else rest


def main() -> None:
    """Propose layers, then edit every range."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder made by the command demo; its tuning.json and corpus.txt are used")
    parser.add_argument("--records", default="atlas-tuning", help="without --model")
    parser.add_argument("--settings", nargs="*", default=[], metavar="NAME=VALUE", help="options of fit")
    parser.add_argument("--limit", type=int, default=100, help="edits, in one edit batch")
    parser.add_argument("--layers", nargs="+", default=list(RANGES))
    parser.add_argument("--facts", type=int, default=100, help="facts of the proposal; 0 leaves it out")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    out = sys.stdout.write
    common = {"data.limit": options.limit, "model.free_tokens": 0, "drift.text": None}
    common |= source(options) | dict(setting.split("=", 1) for setting in options.settings)
    with tempfile.TemporaryDirectory() as base:
        first: list[int] = []
        if options.facts:
            name, records = common.get("model.model_name", "atlas"), common["data.path"]
            first, line = proposal(name, records, options.facts, base)
            out(line)
        out(f"{options.limit} edits of {common['data.path']}, seed 0, {' '.join(options.settings)}\n\n")
        out("| layers | " + " | ".join(METRICS) + " | to the proposal |\n" + "|---" * (len(METRICS) + 2) + "|\n")
        proposed = None
        for number, layers in enumerate(ranges(options, first)):
            changes = {**common, "model.layers": layers, "model.targets_folder": f"{base}/targets"}
            report = read_report(run_fit("pmet.yaml", quiet(changes, Path(base) / str(number))))
            table, rows = report["scores"]["after"], edit_rows([report], "after")
            proposed = rows if first and number == 0 else proposed
            if proposed is not None and number:
                table |= {name: float(value) for name, value in score_difference(rows, proposed).items()}
            out(f"| {layers} | {' | '.join(score_cell(table, metric) for metric in (*METRICS, 'difference'))} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

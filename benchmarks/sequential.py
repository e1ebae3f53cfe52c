"""Which v* is best in sequential blocks, where a delta on the attention reaches the FFN of the same layer.

    python -m pmet_lightning demo --architecture llama --out /tmp/llama      # about ten minutes each
    python -m pmet_lightning demo --architecture gpt2 --out /tmp/gpt2
    python benchmarks/sequential.py /tmp/llama
    python benchmarks/sequential.py /tmp/gpt2 --layers 0 --clamp 30 --lr 2 --lam 50

Both deltas with v* as stored (clean output plus delta) or as realized (the model's output with both deltas), and the
FFN's delta alone, for which the two are the same. Each variant is tried with every --lam on 200 tuning records; the
highest efficacy, then Score, wins. The table is made on 200 other records.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import tempfile
from pathlib import Path

from pmet_lightning.compare.plan import quiet, read_report
from pmet_lightning.evaluation.scores import METRICS
from pmet_lightning.report.tables import score_cell
from pmet_lightning.run.lightning_cli import run_fit

VARIANTS = {
    "both deltas, stored": ("attn+ffn", "stored"),
    "both deltas, realized": ("attn+ffn", "realized"),
    "the FFN's delta alone": ("ffn", "stored"),
}


def run(base: Path, model: str, variant: str, records: str, lam: float, given: argparse.Namespace) -> dict[str, float]:
    """Scores after one run; statistics and target vectors are kept between runs."""
    optimize, value = VARIANTS[variant]
    options = {
        "moments.folder": str(base / "moments"), "drift.text": None, "model.free_tokens": 0,
        "model.model_name": f"{model}/model", "model.layers": given.layers, "model.clamp": given.clamp,
        "model.optimizer.init_args.lr": given.lr, "model.optimize": optimize, "model.target_value": value,
        "model.targets_folder": str(base / "targets"), "spread.lam": lam,
        "data.path": f"{model}/{records}.json", "data.limit": 200,
    }  # fmt: skip
    return read_report(run_fit("pmet.yaml", quiet(options, Path(tempfile.mkdtemp(dir=base)))))["scores"]["after"]


def main() -> None:
    """Tune and report every model with every variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="folders made by the command demo")
    parser.add_argument("--layers", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--clamp", type=float, default=2)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--lam", nargs="+", type=float, default=[20, 50])
    options = parser.parse_args()
    logging.disable(logging.INFO)
    out = sys.stdout.write
    out("| model | v* | λ | " + " | ".join(METRICS) + " |\n" + "|---" * (len(METRICS) + 3) + "|\n")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for model, variant in itertools.product(options.models, VARIANTS):
            found = {}
            for lam in options.lam:
                after = run(base, model, variant, "tuning", lam, options)
                found[lam] = (after["efficacy"], after["score"])
            best = max(found, key=found.__getitem__)
            table = run(base, model, variant, "records", best, options)
            cells = " | ".join(score_cell(table, metric) for metric in METRICS)
            out(f"| {Path(model).name} | {variant} | {best} | {cells} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

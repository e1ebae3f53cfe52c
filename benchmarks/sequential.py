"""What v* is to be in sequential blocks, where a delta on the attention reaches the FFN of the same layer.

    python -m pmet_lightning demo --architecture llama --out /tmp/llama      # about ten minutes each
    python -m pmet_lightning demo --architecture gpt2 --out /tmp/gpt2
    python benchmarks/sequential.py /tmp/llama /tmp/gpt2

Both deltas with v* as stored (clean output plus delta) or as realised (the model's output with both deltas), and the
FFN's delta alone, where the two are the same. For each λ 20 and 50 on 200 tuning records; the highest efficacy, then
Score, wins. The table is made on 200 other records.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import tempfile
from pathlib import Path

from pmet_lightning.cli import main as pmet
from pmet_lightning.metrics import METRICS
from pmet_lightning.recorder import score_cell

VARIANTS = {
    "both deltas, stored": ("attn+ffn", "stored"),
    "both deltas, realised": ("attn+ffn", "realised"),
    "the FFN's delta alone": ("ffn", "stored"),
}


def run(base: Path, model: str, variant: str, records: str, lam: float) -> dict[str, float]:
    """Scores after one run; statistics and target vectors are kept between runs."""
    folder = Path(tempfile.mkdtemp(dir=base))
    optimise, value = VARIANTS[variant]
    pmet([
        "fit", "--config", "pmet.yaml", "--trainer.run_dir", str(folder), "--trainer.logger", "false",
        "--trainer.enable_progress_bar", "false", "--moments.folder", str(base / "moments"), "--drift.text", "null",
        "--model.model_name", f"{model}/model", "--model.layers", "[0, 1]", "--model.clamp", "2",
        "--model.optimise", optimise, "--model.target_value", value, "--model.free_tokens", "0",
        "--model.targets_folder", str(base / "targets"), "--spread.lam", str(lam),
        "--data.path", f"{model}/{records}.json", "--data.limit", "200",
    ])  # fmt: skip
    return json.loads((folder / "scores.json").read_text())["after"]


def main() -> None:
    """Tune and report every model with every variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="folders made by the verb demo")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    out = sys.stdout.write
    out("| model | v* | λ | " + " | ".join(METRICS) + " |\n" + "|---" * (len(METRICS) + 3) + "|\n")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for model, variant in itertools.product(options.models, VARIANTS):
            found = {}
            for lam in (20, 50):
                after = run(base, model, variant, "tuning", lam)
                found[lam] = (after["efficacy"], after["score"])
            best = max(found, key=found.__getitem__)
            table = run(base, model, variant, "records", best)
            cells = " | ".join(score_cell(table, metric) for metric in METRICS)
            out(f"| {Path(model).name} | {variant} | {best} | {cells} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

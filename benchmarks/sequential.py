"""What v* is to be in sequential blocks: stored (clean output plus delta) or realised (the model's output with it).

    python -m pmet_lightning demo --architecture llama --out /tmp/llama      # about ten minutes each
    python -m pmet_lightning demo --architecture gpt2 --out /tmp/gpt2
    python benchmarks/sequential.py /tmp/llama /tmp/gpt2

For each model and value: λ 50 and 200 on 200 tuning records; the highest efficacy, then Score, wins. The table is made
on 200 other records.
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

VALUES = ("stored", "realised")


def run(base: Path, model: str, value: str, records: str, lam: float) -> dict[str, dict[str, float]]:
    """Scores before and after of one run; statistics and target vectors are kept between runs."""
    folder = Path(tempfile.mkdtemp(dir=base))
    pmet([
        "fit", "--config", "pmet.yaml", "--trainer.run_dir", str(folder), "--trainer.logger", "false",
        "--trainer.enable_progress_bar", "false", "--moments.folder", str(base / "moments"),
        "--model.model_name", f"{model}/model", "--model.target_value", value,
        "--model.targets_folder", str(base / "targets"), "--spread.lam", str(lam),
        "--data.path", f"{model}/{records}.json", "--data.limit", "200",
    ])  # fmt: skip
    return json.loads((folder / "scores.json").read_text())


def main() -> None:
    """Tune and report every model with both values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="folders made by the verb demo")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    out = sys.stdout.write
    out("| model | v* | λ | " + " | ".join(METRICS) + " |\n" + "|---" * (len(METRICS) + 3) + "|\n")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for model, value in itertools.product(options.models, VALUES):
            found = {}
            for lam in (50, 200):
                after = run(base, model, value, "tuning", lam)["after"]
                found[lam] = (after["efficacy"], after["score"])
            best = max(found, key=found.__getitem__)
            table = run(base, model, value, "records", best)["after"]
            cells = [f"{table[m]:.1f} [{table[f'{m}_low']:.1f}, {table[f'{m}_high']:.1f}]" for m in METRICS]
            out(f"| {Path(model).name} | {value} | {best} | {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

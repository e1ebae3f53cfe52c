"""λ by hand and by a rule: scores with --spread.lam and with --spread.max_change, from the same target vectors.

python benchmarks/max_change.py pmet.yaml --lam 50 --set data.path=atlas-tuning data.limit=200
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from pmet_lightning.compare.plan import quiet, read_report
from pmet_lightning.evaluation.scores import METRICS
from pmet_lightning.report.tables import score_cell
from pmet_lightning.run.lightning_cli import run_fit

LEAST = 1.0  # λ that a bound raises


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="configuration of fit, a file or the name of a shipped one")
    parser.add_argument("--lam", nargs="*", type=float, default=[])
    parser.add_argument("--bounds", nargs="*", type=float, default=[0.25, 0.5, 1.0], help="values of max_change")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further options of fit")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    given = {name: yaml.safe_load(value) for name, value in (word.split("=", 1) for word in options.set)}
    rules: list[tuple[str, dict[str, Any]]] = [(f"λ {lam:g}", {"spread.lam": lam}) for lam in options.lam]
    rules += [(f"c {bound:g}", {"spread.lam": LEAST, "spread.max_change": bound}) for bound in options.bounds]
    out = sys.stdout.write
    names = [*METRICS, "KL on neighbors", "perplexity", "λ by layer"]
    out("| | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|\n")
    with tempfile.TemporaryDirectory() as base:
        kept = {"moments.folder": f"{base}/moments", "model.targets_folder": f"{base}/targets", "model.free_tokens": 0}
        for number, (name, rule) in enumerate(rules):
            report = read_report(run_fit(options.config, quiet({**kept, **given, **rule}, Path(base) / str(number))))
            before, after = report["scores"]["before"], report["scores"]["after"]
            cells = [score_cell(after, metric) for metric in METRICS] + [f"{after['specificity_kl']:.2f}"]
            cells.append(f"× {after['perplexity'] / before['perplexity']:.2f}" if "perplexity" in after else "")
            cells.append(", ".join(f"{layer['lam']:.3g}" for layer in report["layers"]))
            out(f"| {name} | {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

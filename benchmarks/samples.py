"""How much text the second moments need: scores on Atlas by the number of texts, with the same target vectors.

python benchmarks/samples.py [--records atlas-tuning] [--limit 200]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from pmet_lightning.compare.plan import quiet, read_report
from pmet_lightning.evaluation.scores import METRICS
from pmet_lightning.moments.store import stored_moments
from pmet_lightning.report.tables import score_cell
from pmet_lightning.run.lightning_cli import run_fit

SAMPLES = ("20", "60", "200", "600", "2000", "auto")


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", default="atlas-tuning")
    parser.add_argument("--limit", type=int, default=200)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    out = sys.stdout.write
    out(f"{options.limit} edits of {options.records}, seed 0\n\n")
    out("| texts | tokens | tokens / d_k | " + " | ".join(METRICS) + " |\n" + "|---" * (len(METRICS) + 3) + "|\n")
    with tempfile.TemporaryDirectory() as base:
        for samples in SAMPLES:
            moments, folder = Path(base) / f"moments-{samples}", Path(base) / samples
            changes = {
                "moments.folder": str(moments), "moments.samples": samples, "model.targets_folder": f"{base}/targets",
                "data.path": options.records, "data.limit": options.limit,
            }  # fmt: skip
            table = read_report(run_fit("pmet.yaml", quiet(changes, folder)))["scores"]["after"]
            found = next(stored_moments(moments))
            cells = [score_cell(table, metric) for metric in METRICS]
            tokens, width = int(found["tokens"]), int(found["width"])
            out(f"| {samples} | {tokens} | {tokens / width:.1f} | {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

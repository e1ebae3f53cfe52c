"""Scores on Atlas of PMET, its ablations and the MEMIT variant: same records, same contexts, same seed.

    python benchmarks/atlas.py [--records atlas-records] [--limit 200] [--seed 0]
    python benchmarks/atlas.py --tune        # what METHODS was chosen from: the grid, on records of atlas-tuning

Every method is tuned by the same grid on records that are not reported: 2 clamps (MEMIT, whose clamp is measured on the
layer's output: 3), kl_factor 0 and 0.0625, λ 50, 200 and 400, and twice as much as long as the largest is the best, on
200 records; the four best points on 200 more. The highest efficacy over both wins, then the highest Score.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from pmet_lightning.cli import main as pmet
from pmet_lightning.metrics import METRICS

SWITCHES = {
    "PMET": [],
    "attention not optimised": ["--model.optimise", "ffn"],
    "attention written too": ["--spread.write", "attn+ffn"],
    "even spread": ["--spread.rule", "even"],
    "MEMIT": ["--model.optimise", "hidden", "--spread.rule", "even"],
}
# Chosen with --tune: clamp, kl_factor, lam.
CHOSEN = {
    "PMET": (5, 0, 50),
    "attention not optimised": (5, 0.0625, 400),
    "attention written too": (3, 0.0625, 800),
    "even spread": (5, 0, 50),
    "MEMIT": (1.5, 0.0625, 200),
}


def grid(method: str) -> list[tuple[float, float, float]]:
    """Settings tried for a method: clamp, kl_factor, lam; those that share target vectors follow each other."""
    clamps = (0.75, 1.5, 3) if method == "MEMIT" else (3, 5)
    return list(itertools.product(clamps, (0, 0.0625), (50, 200, 400)))


class Bench:
    """Runs of one set of records; statistics and, where asked for, target vectors are kept between them."""

    def __init__(self, base: str, records: str, limit: int, seed: int) -> None:
        self.base, self.records, self.limit, self.seed = Path(base), records, limit, seed
        self.runs = 0

    def run(self, method: str, setting: tuple[float, float, float], *, skip: int = 0, reuse: bool = False) -> Outcome:
        """Edit with one method; with ``reuse`` target vectors are kept for the next run."""
        clamp, kl_factor, lam = setting
        folder = self.base / str(self.runs)
        self.runs += 1
        start = time.perf_counter()
        pmet([
            "fit", "--config", "pmet.yaml", "--trainer.run_dir", str(folder), "--trainer.logger", "false",
            "--trainer.enable_progress_bar", "false", "--moments.folder", str(self.base / "moments"),
            "--data.path", self.records, "--data.skip", str(skip), "--data.limit", str(self.limit),
            "--model.seed", str(self.seed), "--model.targets_folder", str(self.base / "targets") if reuse else "null",
            "--model.clamp", str(clamp), "--model.kl_factor", str(kl_factor), "--spread.lam", str(lam),
            *SWITCHES[method],
        ])  # fmt: skip
        return Outcome(json.loads((folder / "scores.json").read_text()), time.perf_counter() - start)


class Outcome(NamedTuple):
    """Scores before and after, and seconds of the whole run."""

    scores: dict[str, dict[str, float]]
    seconds: float

    @property
    def rank(self) -> tuple[float, float]:
        """Efficacy first, then Score."""
        return self.scores["after"]["efficacy"], self.scores["after"]["score"]


def cell(table: dict[str, float], name: str) -> str:
    """A score with its interval."""
    return f"{table[name]:.1f} [{table[f'{name}_low']:.1f}, {table[f'{name}_high']:.1f}]"


def report(bench: Bench, methods: list[str], skip: int) -> None:
    """The table of the methods with their chosen settings."""
    rows: dict[str, tuple[dict[str, float], float]] = {}
    for method in methods:
        outcome = bench.run(method, CHOSEN[method], skip=skip)
        rows.setdefault("unedited", (outcome.scores["before"], 0.0))
        rows[method] = (outcome.scores["after"], outcome.seconds)
    out = sys.stdout.write
    out(f"{bench.limit} edits of {bench.records}, seed {bench.seed}\n\n")
    out("| method | " + " | ".join(METRICS) + " | seconds |\n" + "|---" * (len(METRICS) + 2) + "|\n")
    for name, (table, seconds) in rows.items():
        out(f"| {name} | " + " | ".join(cell(table, metric) for metric in METRICS) + f" | {seconds:.0f} |\n")


def tune(bench: Bench, methods: list[str]) -> None:
    """The grid on the first records, its four best points on the next ones too, the best on average."""
    for method in methods:
        first = {setting: bench.run(method, setting, reuse=True).rank for setting in grid(method)}
        best = max(first, key=first.__getitem__)
        while best[2] == max(lam for _, _, lam in first):
            clamp, kl_factor, lam = best
            first[clamp, kl_factor, 2 * lam] = bench.run(method, (clamp, kl_factor, 2 * lam), reuse=True).rank
            best = max(first, key=first.__getitem__)
        both = {}
        for setting in sorted(first, key=first.__getitem__, reverse=True)[:4]:
            second = bench.run(method, setting, skip=bench.limit, reuse=True).rank
            both[setting] = tuple((a + b) / 2 for a, b in zip(first[setting], second, strict=True))
        for found in (first, both):
            for setting, (efficacy, score) in found.items():
                sys.stdout.write(f"{method}: clamp, kl, lam {setting}: efficacy {efficacy:.2f}, Score {score:.2f}\n")
        sys.stdout.write(f"{method}: chosen {max(both, key=both.__getitem__)}\n")
        sys.stdout.flush()


def main() -> None:
    """Tune, or make the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", help="records; atlas-records, and atlas-tuning for --tune")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--skip", type=int, default=0, help="records left out at the beginning")
    parser.add_argument("--methods", nargs="+", choices=list(SWITCHES), default=list(SWITCHES))
    parser.add_argument("--seed", type=int, default=0, help="seed of the contexts")
    parser.add_argument("--tune", action="store_true", help="try the grid instead")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    records = options.records or ("atlas-tuning" if options.tune else "atlas-records")
    with tempfile.TemporaryDirectory() as base:
        bench = Bench(base, records, options.limit, options.seed)
        if options.tune:
            tune(bench, options.methods)
        else:
            report(bench, options.methods, options.skip)


if __name__ == "__main__":
    main()

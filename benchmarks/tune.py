"""The search that the settings in configs/compare.yaml come from: the same for every method, on records not reported.

    python benchmarks/tune.py [--methods PMET MEMIT] [--limit 200]

Every method gets a grid of about a dozen settings on the first 200 records of atlas-tuning, λ is doubled as long as the
largest value is the best, and the four best settings run on the next 200 records too. The highest efficacy over both
wins, then the highest Score.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pmet_lightning.compare.plan import Method, quiet, read_report
from pmet_lightning.run.lightning_cli import run_fit
from pmet_lightning.utils.resources import locate_config

LAM = "spread.lam"
_PMET = {"model.clamp": (3, 5), "model.kl_factor": (0, 0.0625), LAM: (50, 200, 400)}
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "PMET": _PMET,
    "attention not optimized": _PMET,
    "attention written too": _PMET,
    "even spread": _PMET,
    "PMET to the loss": _PMET,
    "MEMIT": _PMET | {"model.clamp": (0.75, 1.5, 3)},  # relative to the layer's output, which has a larger norm
    "null space": {"model.clamp": (3, 5), "spread.null_space": (0.003, 0.01, 0.03, 0.1), LAM: (10, 50, 200)},
    "fine-tuning": {
        "model.layers": ([0], [1], [2], [3]),
        "model.optimizer.init_args.lr": (0.0003, 0.001, 0.003),
        "model.epochs": (30, 100),
    },
}


class Rank(NamedTuple):
    """Efficacy first, then Score."""

    efficacy: float
    score: float


class Bench:
    """Runs on one file of records; statistics and target vectors are kept between them."""

    def __init__(self, base: Path, records: str, limit: int) -> None:
        self.base, self.records, self.limit, self.runs = base, records, limit, 0

    def run(self, method: Method, setting: Mapping[str, Any], skip: int = 0) -> Rank:
        """Efficacy and Score with one setting."""
        folder = self.base / str(self.runs)
        self.runs += 1
        options = method.options | dict(setting) | {
            "data.path": self.records, "data.limit": self.limit, "data.skip": skip, "model.free_tokens": 0,
            "drift.text": None,
        }  # fmt: skip
        if method.command == "fit":
            options["model.targets_folder"] = str(self.base / "targets")
        after = read_report(run_fit(method.config, quiet(options, folder), method.command))["scores"]["after"]
        rank = Rank(after["efficacy"], after["score"])
        sys.stdout.write(f"{dict(setting)}, from {skip}: efficacy {rank.efficacy:.1f}, Score {rank.score:.1f}\n")
        sys.stdout.flush()
        return rank


def settings(grid: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """All points of a grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def tune(bench: Bench, name: str, method: Method) -> None:
    """Try the grid on the first records and its four best points on the next ones too; print the best on average."""
    tried = [(setting, bench.run(method, setting)) for setting in settings(GRIDS[name])]
    while True:
        best, _ = max(tried, key=lambda pair: pair[1])
        if LAM not in best or best[LAM] < max(setting[LAM] for setting, _ in tried):
            break
        further = best | {LAM: 2 * best[LAM]}
        tried.append((further, bench.run(method, further)))
    final = []
    for setting, first in sorted(tried, key=lambda pair: pair[1], reverse=True)[:4]:
        second = bench.run(method, setting, skip=bench.limit)
        final.append((setting, Rank(*((a + b) / 2 for a, b in zip(first, second, strict=True)))))
    setting, rank = max(final, key=lambda pair: pair[1])
    sys.stdout.write(f"{name}: chosen {setting}: efficacy {rank.efficacy:.2f}, Score {rank.score:.2f}\n\n")
    sys.stdout.flush()


def main() -> None:
    """Tune the methods of configs/compare.yaml."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", default="atlas-tuning")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--methods", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    options = parser.parse_args()
    logging.disable(logging.INFO)
    methods = yaml.safe_load(Path(locate_config("compare.yaml")).read_text())["methods"]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.records, options.limit)
        for name in options.methods:
            tune(bench, name, Method(**methods[name]))


if __name__ == "__main__":
    main()

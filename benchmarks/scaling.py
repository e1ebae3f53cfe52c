"""Editing with two processes of one thread each compared with one: the same edits, the same targets.

    python benchmarks/scaling.py [--edits 800] [--repeat 5]

Every run is a fresh ``fit`` of the shipped model without evaluation; its phases come from its report. Targets need no
communication; that of the writes is computed from the shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from pmet_lightning.utils.distributed import sums_are_less, travelling_bytes

LAYERS, WIDTH, KEYS = 3, 192, 768  # edited layers, model width and key dimensions of the shipped model
NUMBER = 4  # bytes per element of ΔW
RECORDS = ["atlas-records", "atlas-spare", "atlas-tuning"]  # 840


def phases(folder: Path, processes: int, edits: int) -> dict[str, float]:
    """Seconds of each phase of a run."""
    several = ["--trainer.strategy", "ddp"] if processes > 1 else []
    command = [
        sys.executable, "-m", "pmet_lightning", "fit", "--config", "pmet.yaml", "--trainer.run_dir", str(folder),
        "--trainer.accelerator", "cpu", "--trainer.devices", str(processes), *several, "--trainer.logger", "false",
        "--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0", "--drift.text", "null",
        "--data.path", json.dumps(RECORDS), "--data.limit", str(edits),
        "--moments.folder", str(folder.parent / "moments"),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=folder.parent)
    return dict(json.loads((folder / "report.json").read_text())["phases"])


def travels(edits: int, layers: int, keys: int, width: int) -> float:
    """Megabytes communicated at the writes: keys and residuals or their products, then ΔW; float32."""
    shapes = torch.empty(0, keys), torch.empty(0, width)
    gathered = travelling_bytes(edits, *shapes, sums=sums_are_less(edits, *shapes))
    return layers * (gathered + NUMBER * keys * width) / 1e6


def main() -> None:
    """Compare the runs, and compute the communication."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=800)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    out = sys.stdout.write
    out(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as base:
        phases(Path(base) / "first", 1, 2)  # collects the second moments
        for number in range(options.repeat):
            for processes, runs in found.items():
                runs.append(phases(Path(base) / f"{processes}-{number}", processes, options.edits))
    rates = {}
    for processes, runs in found.items():
        # A process that finishes first waits for the other in the write.
        whole = statistics.median(run["targets"] + run["spread"] for run in runs)
        rates[processes] = options.edits / statistics.median(run["targets"] for run in runs)
        out(f"{processes} x 1 thread: {rates[processes]:.2f} edits/s, targets and write {whole:.2f} s\n")
    out(f"ratio {rates[2] / rates[1]:.2f}, median of {options.repeat}, {options.edits} edits\n")
    out(f"communication: {travels(options.edits, LAYERS, KEYS, WIDTH):.1f} MB; ")
    out(f"GPT-J 6B, 10,000 edits, six layers: {travels(10_000, 6, 16_384, 4_096):,.0f} MB for each device\n")


if __name__ == "__main__":
    main()

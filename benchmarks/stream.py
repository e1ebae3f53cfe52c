"""A long stream of edits: whether the time per edit batch and the resident memory stay constant, and the peak memory.

    python benchmarks/stream.py [--edits 10000] [--edit_batch 100] [--model FOLDER] [--steps 10]

The records are those of an Atlas world with that many subjects. The model, the shipped one unless another is given,
need not know them, since only cost is measured. Past keys are protected and no limit ends the run.
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
import time
from pathlib import Path

from pmet_lightning.demo.records import records
from pmet_lightning.demo.world import build_world

POLL = 0.2  # seconds
SPARE = 1.01  # some subjects have no record


def write_records(path: Path, count: int) -> None:
    """Write records of a new world, one per line."""
    made = records(build_world(0, round(count * SPARE)), 0)[:count]
    if len(made) < count:
        raise ValueError(f"{count} records were requested, and the world has {len(made)}")
    path.write_text("".join(json.dumps(record) + "\n" for record in made), encoding="utf-8")


def memory(process: int, what: str) -> float:
    """Memory in MiB, resident now (``VmRSS``) or at its peak (``VmHWM``); 0 once the process is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(what)), 0.0)


def watched(command: list[str], journal: Path) -> tuple[list[tuple[float, float]], float, float]:
    """Time and MiB after each edit batch in the journal; the peaks until the last one, and of the whole run.

    Raises:
        RuntimeError: If the run failed.
    """
    found: list[tuple[float, float]] = []
    by_last = peak = 0.0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while process.poll() is None:
            lines = journal.read_bytes().count(b"\n") if journal.is_file() else 0
            if lines > len(found):
                found += [(time.perf_counter(), memory(process.pid, "VmRSS"))] * (lines - len(found))
                by_last = memory(process.pid, "VmHWM")
            peak = max(peak, memory(process.pid, "VmHWM"))  # including the report at the end
            time.sleep(POLL)
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"the run failed:\n{output.read()[-2000:]}")
    return found, by_last, peak


def main() -> None:
    """Run, and print a line for each tenth of the stream."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=10000)
    parser.add_argument("--edit_batch", type=int, default=100)
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    out = sys.stdout.write
    with tempfile.TemporaryDirectory() as base:
        write_records(Path(base) / "facts.jsonl", options.edits)
        command = [
            sys.executable, "-m", "pmet_lightning", "fit", "--config", "stream.yaml",
            "--trainer.run_dir", f"{base}/run", "--data.path", f"{base}/facts.jsonl", "--data.stream_wait", "0",
            "--model.model_name", options.model,
            "--data.edit_batch", str(options.edit_batch), "--model.steps", str(options.steps), "--drift.text", "null",
            "--drift.max_perplexity", "null", "--drift.max_growth", "null", "--model.free_tokens", "0",
            "--trainer.enable_progress_bar", "false",
        ]  # fmt: skip
        found, by_last, peak = watched(command, Path(base) / "run" / "batches.jsonl")
    steps = [(b - a, memory) for (a, _), (b, memory) in zip(found, found[1:], strict=False)]
    size = max(1, len(steps) // 10)
    out("| edit batches | seconds for each, median | resident MiB |\n|---|---|---|\n")
    for first in range(0, len(steps) - size + 1, size):
        part = steps[first : first + size]
        seconds = statistics.median(gap for gap, _ in part)
        out(f"| {first + 1} to {first + size} | {seconds:.2f} | {part[-1][1]:.0f} |\n")
    out(f"\npeak MiB (VmHWM): {by_last:.0f} by the last edit batch, {peak:.0f} with the report at the end\n")
    out(
        f"\n{len(found)} edit batches of {options.edit_batch}, {platform.processor() or platform.machine()}, "
        f"{os.cpu_count()} cores, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}\n"
    )


if __name__ == "__main__":
    main()

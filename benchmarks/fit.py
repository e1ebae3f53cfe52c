"""Whole runs: time and memory by the number of edits, phase by phase, and how long the command line takes to start.

    python benchmarks/fit.py [--world FOLDER] [--edits 10 100 1000] [--repeat 1]

Every run is a separate process that starts from nothing, without stored second moments or targets, and writes all edits
in one edit batch, as ``fit --config pmet.yaml`` does. The fixed part is the start (as long as showing the settings
takes), loading the model, the second moments and the contexts. Everything else counts as growing with the edits, so a
constant part of it makes few edits look more expensive, never many. Linear growth is a constant time for each further
edit.

``demo --edits N --out FOLDER`` makes a larger world: with N = 1050 it has enough records for 1,000 edits. The shipped
Atlas, which is used without --world, has 200.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTS = ("--help", "fit --help", "export --help", "compare --help", "demo --help")
SETTINGS = "fit --config pmet.yaml --print_config"
START_REPEAT = 5
FIXED = ("model", "moments", "contexts")  # besides the start
GROWING = ("records", "before", "targets", "spread", "ledger", "after", "report")


@dataclass(frozen=True)
class Point:
    """One number of edits, medians over its runs.

    Attributes:
        edits: How many.
        wall: Seconds of the whole process.
        cpu: Its processor seconds, user and system.
        peak: Its largest resident memory in GiB.
        phases: Seconds of each phase.
        score: Score of the run, which shows that it worked.
    """

    edits: int
    wall: float
    cpu: float
    peak: float
    phases: dict[str, float]
    score: float

    def growing(self, start: float) -> float:
        """Seconds beyond the fixed part."""
        return self.wall - start - sum(self.phases[name] for name in FIXED)


def timed(command: Sequence[str]) -> tuple[float, float, str]:
    """Seconds and processor seconds of a process, and its standard output.

    Raises:
        RuntimeError: If it failed; the message ends with its error output.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def child(arguments: Sequence[str]) -> None:
    """Run a command in this process, and print its peak memory in KiB.

    Not ``ru_maxrss``, which starts at the value of the parent.
    """
    from pmet_lightning.cli.dispatch import main as run

    run(arguments)
    status = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    sys.stdout.write(f"\n{peak}\n")


def one_run(edits: int, world: Sequence[str]) -> dict[str, Any]:
    """The measurements of one run.

    Raises:
        ValueError: If the world has fewer records.
    """
    with tempfile.TemporaryDirectory() as base:
        arguments = [
            *("fit", "--config", "pmet.yaml", "--trainer.run_dir", f"{base}/run", "--data.limit", str(edits)),
            *("--trainer.enable_progress_bar", "false", "--moments.folder", f"{base}/moments", *world),
        ]
        wall, cpu, output = timed([__file__, "--child", json.dumps(arguments)])
        report = json.loads(Path(base, "run", "report.json").read_text(encoding="utf-8"))
    if len(report["edits"]) < edits:
        raise ValueError(f"{edits} edits were requested, and the world has {len(report['edits'])} records")
    peak = int(output.split()[-1]) / 2**20
    return {"wall": wall, "cpu": cpu, "peak": peak, "score": report["scores"]["after"]["score"], **report["phases"]}


def point(edits: int, world: Sequence[str], repeat: int) -> Point:
    """Medians over some runs."""
    runs = [one_run(edits, world) for _ in range(repeat)]
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    phases = {name: median[name] for name in (*FIXED, *GROWING)}
    return Point(edits, median["wall"], median["cpu"], median["peak"], phases, median["score"])


def options_of(world: Path | None) -> list[str]:
    """A world's model, records and text as options; none for the shipped one."""
    if world is None:
        return []
    paths = [str(world / f"{name}.json") for name in ("records", "spare", "tuning")]
    corpus = str(world / "corpus.txt")
    return [
        *("--model.model_name", str(world / "model"), "--data.path", json.dumps(paths)),
        *("--moments.corpus", corpus, "--drift.text", corpus),
    ]


def show_starts() -> float:
    """Print the start-up times, and return that of a fit that only shows its settings."""
    wall = 0.0
    for arguments in (*STARTS, SETTINGS):
        times = [timed(["-m", "pmet_lightning", *arguments.split()])[:2] for _ in range(START_REPEAT)]
        wall, cpu = (statistics.median(values) for values in zip(*times, strict=True))
        sys.stdout.write(f"{arguments}: {wall:.2f} s, processor {cpu:.2f} s, median of {START_REPEAT}\n")
        sys.stdout.flush()
    return wall


def show(found: Sequence[Point], start: float) -> None:
    """Print the table of the runs, that of their phases, and the line fitted to them."""
    out = sys.stdout.write
    out("\n| edits | seconds | processor | peak GiB | fixed | growing | per edit | each further edit | Score |\n")
    out("|---" * 9 + "|\n")
    for i, p in enumerate(found):
        growing = p.growing(start)
        further = "-"
        if i:
            last = found[i - 1]
            further = f"{(growing - last.growing(start)) / (p.edits - last.edits):.4f}"
        out(f"| {p.edits} | {p.wall:.1f} | {p.cpu:.1f} | {p.peak:.2f} | {p.wall - growing:.1f} | {growing:.1f} | ")
        out(f"{growing / p.edits:.4f} | {further} | {p.score:.1f} |\n")
    out("\n| edits | start | " + " | ".join((*FIXED, *GROWING)) + " | rest |\n")
    out("|---" * (len(FIXED) + len(GROWING) + 3) + "|\n")
    for p in found:
        cells = [start, *p.phases.values(), p.wall - start - sum(p.phases.values())]
        out(f"| {p.edits} | " + " | ".join(f"{seconds:.1f}" for seconds in cells) + " |\n")
    if len(found) > 1:
        slope, intercept = statistics.linear_regression([p.edits for p in found], [p.wall for p in found])
        deviation = max(abs(p.wall - intercept - slope * p.edits) / p.wall for p in found)
        out(f"\nleast squares: {intercept:.1f} s + {slope:.4f} s for each edit, at most {deviation:.0%} off\n")


def main() -> None:
    """Measure the starts, then the runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, help="a folder made by the command demo; by default the shipped Atlas")
    parser.add_argument("--edits", type=int, nargs="+", help="by default 10 100 1000, on the shipped Atlas 10 50 200")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    edits = sorted(options.edits or ([10, 50, 200] if options.world is None else [10, 100, 1000]))
    start = show_starts()
    found = [point(count, options_of(options.world), options.repeat) for count in edits]
    show(found, start)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightning"))
    sys.stdout.write(
        f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}, {versions}, "
        f"Python {platform.python_version()}, median of {options.repeat}\n"
    )


if __name__ == "__main__":
    main()

"""The command ``compare``: runs several methods on the same records, seeds and contexts."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmet_lightning.compare.plan import Method, Run, plan_runs, quiet, read_report
from pmet_lightning.utils.files import write_json
from pmet_lightning.utils.types import NonNegativeInt, PositiveInt

log = logging.getLogger(__name__)


def compare(
    methods: dict[str, Method],
    out: str,
    edits: list[PositiveInt],
    seeds: list[NonNegativeInt],
    least: PositiveInt = 10,
    options: dict[str, Any] | None = None,
) -> None:
    """Run several methods on the same records: one table and one plot of the Score against the number of edits.

    A comparison that was stopped resumes where it was: runs that are finished in the folder are not repeated.

    Args:
        methods: Name and settings of each method.
        out: Folder for the runs, comparison.json, comparison.csv and comparison.html.
        edits: Numbers of edits; each number is written in one edit batch.
        seeds: Each seed shuffles the records and samples its own contexts.
        least: Minimum number of records evaluated for each seed: a run with fewer edits is repeated on further
            records.
        options: Options that all runs share, such as data.path.

    Raises:
        ValueError: If there is nothing to compare, too few records, or the folder holds runs with other settings.
    """
    if not (methods and edits and seeds):
        raise ValueError("--methods, --edits and --seeds: expected at least one of each")
    folder, common = Path(out).expanduser(), options or {}
    runs = list(plan_runs(methods, edits, seeds, least))
    for name, method in methods.items():
        largest = max((run for run in runs if run.method == name), key=lambda run: run.skip + run.edits)
        _check(largest, method, common, folder)
    for number, run in enumerate(runs, start=1):
        log.info("run %d of %d: %s, %d edits, seed %d", number, len(runs), run.method, run.edits, run.seed)
        _run(run, methods[run.method], common, folder)
    from pmet_lightning.compare.results import write_results  # seconds of imports, which --help does not wait for

    write_results(methods, runs, folder)


def _check(run: Run, method: Method, common: Mapping[str, Any], folder: Path) -> None:
    """Check settings and records of the run that needs the most records, before hours of other runs.

    Raises:
        ValueError: If there are too few records.
    """
    from pmet_lightning.run.lightning_cli import build_fit  # seconds of imports

    if _finished(folder / run.name):
        return
    settings = quiet(run.settings(method, common, folder), folder / run.name)
    data = build_fit(method.config, settings, method.command).datamodule
    data.setup("fit")
    if not data.stream:  # the length of a stream is known only after it was read
        _check_count(run, len(data.edits))


def _check_count(run: Run, found: int) -> None:
    if found < run.edits:
        raise ValueError(
            f"{run.edits} edits were requested from record {run.skip} on, and the data has {found}; give more records "
            "(data.path may be a list), or set smaller --edits"
        )


def _run(run: Run, method: Method, common: Mapping[str, Any], folder: Path) -> None:
    """Run one method once, unless its folder is finished; an unfinished folder is removed first."""
    from pmet_lightning.run.lightning_cli import run_fit  # seconds of imports

    run_dir, settings = folder / run.name, run.settings(method, common, folder)
    wanted = {"command": method.command, "config": method.config, "settings": settings}
    if _finished(run_dir):
        if json.loads((run_dir / "run.json").read_text(encoding="utf-8")) != wanted:
            raise ValueError(f"{run_dir} holds a run with other settings; set --out to another folder, or remove it")
        return
    if run_dir.exists():
        shutil.rmtree(run_dir)
    report = read_report(run_fit(method.config, quiet(settings, run_dir), method.command))
    _check_count(run, len(report["edits"]))
    write_json(run_dir / "run.json", wanted)


def _finished(folder: Path) -> bool:
    return (folder / "run.json").is_file() and (folder / "report.json").is_file()

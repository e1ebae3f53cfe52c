"""The command ``compare``: several methods on the same records, seeds and contexts; one table, one plot."""

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

    A comparison that was stopped goes on where it was: runs that are finished in the folder are not run again.

    Args:
        methods: Name and settings of each method.
        out: Folder of the runs, of comparison.json, comparison.csv and comparison.html.
        edits: Numbers of edits, each written in one edit batch.
        seeds: Each shuffles the records and samples contexts of its own.
        least: With fewer edits than this, a seed is repeated on further records until so many were evaluated.
        options: Options that all runs share, such as data.path.

    Raises:
        ValueError: If there is nothing to compare, too few records, or a folder that holds runs with other settings.
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
    """Read the settings and records of the run that needs most records: hours of others may come before it.

    Raises:
        ValueError: If there are too few.
    """
    from pmet_lightning.run.lightning_cli import build_fit  # as above

    if _finished(folder / run.name):
        return
    settings = quiet(run.settings(method, common, folder), folder / run.name)
    data = build_fit(method.config, settings, method.command).datamodule
    data.setup("fit")
    if not data.stream:  # whose end is known when it was read
        _check_count(run, len(data.edits))


def _check_count(run: Run, found: int) -> None:
    if found < run.edits:
        raise ValueError(
            f"{run.edits} edits were asked for from record {run.skip} on, and the data has {found}; give more records "
            "(data.path may be a list), or set smaller --edits"
        )


def _run(run: Run, method: Method, common: Mapping[str, Any], folder: Path) -> None:
    """Run it unless its folder says that it is finished; what a run left unfinished is removed."""
    from pmet_lightning.run.lightning_cli import run_fit  # as above

    own, settings = folder / run.name, run.settings(method, common, folder)
    wanted = {"command": method.command, "config": method.config, "settings": settings}
    if _finished(own):
        if json.loads((own / "run.json").read_text(encoding="utf-8")) != wanted:
            raise ValueError(f"{own} holds a run with other settings; set --out to another folder, or remove it")
        return
    if own.exists():
        shutil.rmtree(own)
    report = read_report(run_fit(method.config, quiet(settings, own), method.command))
    _check_count(run, len(report["edits"]))
    write_json(own / "run.json", wanted)


def _finished(folder: Path) -> bool:
    return (folder / "run.json").is_file() and (folder / "report.json").is_file()

"""The command ``compare``: runs several methods on the same records, seeds and contexts."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmet_lightning.compare.estimate import longest_first, plan_line, run_line, time_line
from pmet_lightning.compare.plan import Method, Run, Setting, plan_runs, quiet, read_report
from pmet_lightning.utils.console import quieten, quietly, warned_once
from pmet_lightning.utils.files import write_json
from pmet_lightning.utils.types import NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from pmet_lightning.compare.unedited import UneditedModel

log = logging.getLogger(__name__)


def compare(
    methods: dict[str, Method],
    out: str,
    edits: list[PositiveInt],
    seeds: list[NonNegativeInt],
    least: PositiveInt = 10,
    options: dict[str, Setting] | None = None,
) -> None:
    """Run several methods on the same records: a table and a plot of their Scores for each number of edits.

    A comparison that was stopped resumes where it was: runs that are finished in the folder are not repeated.

    Args:
        methods: Name and settings of each method.
        out: Folder for the runs and for comparison.html, .md, .json and .csv.
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
    taken = {run: float(read_report(folder / run.name)["seconds"]) for run in runs if _finished(folder / run.name)}
    log.info("%s", plan_line(runs, taken))
    from pmet_lightning.run import lightning_cli  # noqa: F401  # seconds of imports, which --help does not wait for

    quieten()  # Lightning, once it is imported
    with warned_once():
        with quietly():
            for name, method in methods.items():
                largest = max((run for run in runs if run.method == name), key=lambda run: run.skip + run.edits)
                _check(largest, method, common, folder)
        _run_all(runs, taken, methods, common, folder)
    from pmet_lightning.compare.results import write_results  # seconds of imports

    write_results(methods, runs, folder)


def _run_all(
    runs: Sequence[Run],
    taken: dict[Run, float],
    methods: Mapping[str, Method],
    common: Mapping[str, Any],
    folder: Path,
) -> None:
    """The runs, those with the most edits first, and before each how long all that is left will take.

    Args:
        runs: All runs.
        taken: Seconds of those that are finished; the others are added.
        methods: The methods by name.
        common: Options that all runs share.
        folder: Folder of the comparison.
    """
    from pmet_lightning.compare.unedited import UneditedModel  # seconds of imports

    unedited = UneditedModel()
    for number, run in enumerate(longest_first(runs), start=1):
        left = [other for other in runs if other not in taken]
        if run in left:
            time_left = f"; {time_line(left, taken)}" if taken else ""
            log.info("run %d of %d: %s%s", number, len(runs), run_line(run), time_left)
        start = time.perf_counter()
        _run(run, methods[run.method], common, folder, unedited)
        taken.setdefault(run, time.perf_counter() - start)


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


def _run(run: Run, method: Method, common: Mapping[str, Any], folder: Path, unedited: UneditedModel) -> None:
    """Run one method once, unless its folder is finished; an unfinished folder is removed first."""
    from pmet_lightning.run.lightning_cli import build_fit  # seconds of imports

    run_dir, settings = folder / run.name, run.settings(method, common, folder)
    wanted = {"command": method.command, "config": method.config, "settings": settings}
    if _finished(run_dir):
        if json.loads((run_dir / "run.json").read_text(encoding="utf-8")) != wanted:
            raise ValueError(f"{run_dir} holds a run with other settings; set --out to another folder, or remove it")
        return
    if run_dir.exists():
        shutil.rmtree(run_dir)
    with quietly():
        unedited.fit(build_fit(method.config, quiet(settings, run_dir), method.command))
    report = read_report(run_dir)
    _check_count(run, len(report["edits"]))
    write_json(run_dir / "run.json", wanted)


def _finished(folder: Path) -> bool:
    return (folder / "run.json").is_file() and (folder / "report.json").is_file()

"""The verb ``compare``: several methods on the same records, with the same seed and contexts; one table, one plot."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from pmet_lightning.compare.plan import Method, Run, report_of
from pmet_lightning.utils.files import write_json

log = logging.getLogger(__name__)


def compare(
    methods: dict[str, Method],
    out: str,
    edits: list[PositiveInt],  # type: ignore[valid-type]
    seeds: list[NonNegativeInt],  # type: ignore[valid-type]
    least: PositiveInt = 10,  # type: ignore[valid-type]
    options: dict[str, Any] | None = None,
) -> None:
    """Run several methods on the same records: one table and one plot of the Score against the number of edits.

    A comparison that was stopped goes on where it was: runs that are finished in the folder are not run again.

    Args:
        methods: Name and settings of each method.
        out: Folder of the runs, of comparison.json, comparison.csv and comparison.html.
        edits: Numbers of edits, each written in one edit batch.
        seeds: Each shuffles the records and samples contexts of its own.
        least: With fewer edits than this, a seed is repeated on further records until so many were judged.
        options: Options that all runs share, such as data.path.

    Raises:
        ValueError: If there is nothing to compare, too few records, or a folder that holds runs with other settings.
    """
    if not (methods and edits and seeds):
        raise ValueError("--methods, --edits and --seeds: expected at least one of each")
    folder, common = Path(out).expanduser(), options or {}
    runs = list(_planned(methods, edits, seeds, least))
    for name, method in methods.items():
        largest = max((run for run in runs if run.method == name), key=lambda run: run.skip + run.edits)
        _check(largest, method, common, folder)
    for number, run in enumerate(runs, start=1):
        log.info("run %d of %d: %s, %d edits, seed %d", number, len(runs), run.method, run.edits, run.seed)
        _run(run, methods[run.method], common, folder)
    from pmet_lightning.compare.results import write_results  # seconds of imports, which --help does not wait for

    write_results(methods, runs, folder)


def _planned(methods: Mapping[str, Method], edits: Sequence[int], seeds: Sequence[int], least: int) -> Iterator[Run]:
    """All runs; methods side by side, so that a stopped comparison has something of each."""
    for count in edits:
        for seed in seeds:
            for part in range(max(1, -(-least // count))):
                for method in methods:
                    yield Run(method, count, seed, part * count)


def _settings(run: Run, method: Method, common: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What differs in a run from the configuration of its method."""
    settings = {
        **common,
        **method.options,
        "data.limit": run.edits,
        "data.skip": run.skip,
        "data.shuffle": run.seed,
        "model.seed": run.seed,
    }
    if method.verb == "fit":
        settings.setdefault("model.targets_folder", str(folder / "targets"))
    return settings


def _check(run: Run, method: Method, common: Mapping[str, Any], folder: Path) -> None:
    """Read the settings and records of the run that needs most records: hours of others may come before it.

    Raises:
        ValueError: If there are too few.
    """
    from pmet_lightning.cli.dispatch import edit_cli  # the command line knows this module

    if _finished(folder / run.name):
        return
    arguments = _arguments(method, _settings(run, method, common, folder), folder / run.name)
    data = edit_cli(arguments, run=False).datamodule
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
    place = folder / run.name
    settings = _settings(run, method, common, folder)
    wanted = {"verb": method.verb, "config": method.config, "settings": settings}
    if _finished(place):
        if json.loads((place / "run.json").read_text(encoding="utf-8")) != wanted:
            raise ValueError(f"{place} holds a run with other settings; set --out to another folder, or remove it")
        return
    if place.exists():
        shutil.rmtree(place)
    _check_count(run, len(quiet_run(method, settings, place)["edits"]))
    write_json(place / "run.json", wanted)


def quiet_run(method: Method, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run a method without loggers and progress bars.

    Args:
        method: The method; its own options are not looked at.
        options: What differs from its configuration.
        folder: The run folder.

    Returns:
        What the run's report.json holds.
    """
    from pmet_lightning.cli.dispatch import edit_cli  # the command line knows this module

    edit_cli(_arguments(method, options, folder))
    return report_of(folder)


def _arguments(method: Method, options: Mapping[str, Any], folder: Path) -> list[str]:
    """Of the command line."""
    quiet = {"trainer.run_dir": str(folder), "trainer.logger": False, "trainer.enable_progress_bar": False}
    return [method.verb, "--config", method.config, *options_of({**options, **quiet})]


def options_of(settings: Mapping[str, Any]) -> list[str]:
    """Dotted names and values as arguments of the command line."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return [part for name, text in texts.items() for part in (f"--{name}", text)]


def _finished(place: Path) -> bool:
    return (place / "run.json").is_file() and (place / "report.json").is_file()

"""The report at the end of a run: report.json, report.html and their figures, from journal and evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.evaluation.verdict import verdict_lines
from pmet_lightning.report.figures import figures
from pmet_lightning.report.run_data import add_outcomes, columns_of, edit_lines, relation_lines, saved_settings
from pmet_lightning.report.run_report import worst, write_report
from pmet_lightning.run.journal import Journal
from pmet_lightning.run.outcome import RunOutcome
from pmet_lightning.run.summary import Summary
from pmet_lightning.run.timing import PhaseProfiler
from pmet_lightning.utils.callbacks import all_edits, is_stream
from pmet_lightning.utils.versions import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_REPORTED = 20_000  # edits of a stream


def report_data(
    trainer: L.Trainer,
    module: EditableModel,
    journal: Journal,
    found: Summary,
    folder: Path,
    written: int,
    outcome: RunOutcome,
) -> dict[str, Any]:
    """All that the report shows, except for how long the run took.

    Args:
        trainer: The trainer.
        module: Its module, with the scores.
        journal: What was written down after each edit batch.
        found: Summary of the journal.
        folder: The run folder.
        written: Number of edits in the weights.
        outcome: How the run ended.
    """
    # Of a long stream the report shows the latest edits.
    first = max(0, written - _MAX_REPORTED) if is_stream(trainer) else 0
    edits = edit_lines(all_edits(trainer), itertools.islice(journal.edits(), first, None), module.record_rows, first)
    add_outcomes(edits, outcome.edits, first)
    _add_questions(edits, journal, first)
    return {
        "title": folder.name,
        "model": module.model_name,
        "records": getattr(getattr(trainer, "datamodule", None), "path", None),
        "edits_count": len(all_edits(trainer)) or written,
        "created": datetime.now().astimezone().isoformat(" ", "seconds"),
        "scores": module.results,
        "verdict": outcome.verdict.plain() | {"lines": verdict_lines(outcome.verdict)},
        "edit_batches": found.batches,
        "curves": columns_of([*module.curves, *found.curves]),
        "layers": found.layers,
        "edits": edits,
        "relations": relation_lines(edits, module.record_rows),
        "settings": saved_settings(folder),
        "versions": versions(),
    }


def _add_questions(edits: Sequence[dict[str, Any]], journal: Journal, first: int) -> None:
    """Add the answers to all questions to the edits that the page shows them of."""
    shown = {id(edit) for edit in worst(edits)}
    for edit, line in zip(edits, itertools.islice(journal.answers(), first, None), strict=False):
        if id(edit) in shown:
            edit["questions"] = line["questions"]


def write_final_report(trainer: L.Trainer, data: dict[str, Any], folder: Path, seconds: float) -> dict[str, Figure]:
    """Draw the figures, add the times, and write both files.

    Args:
        trainer: The trainer, whose profiler counts the drawing.
        data: As :func:`report_data` gives it.
        folder: The run folder.
        seconds: Duration of the run, from the first phase after the second moments on.

    Returns:
        The figures by name.
    """
    with trainer.profiler.profile("report"):
        drawn = figures(data)
    data["seconds"] = round(seconds, 1)
    phases = trainer.profiler.phases() if isinstance(trainer.profiler, PhaseProfiler) else {}
    data["phases"] = {phase: round(taken, 3) for phase, taken in phases.items()}
    write_report(data, folder, drawn)
    return drawn

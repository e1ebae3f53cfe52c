"""The page of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmet_lightning.report.html import svg, write_page
from pmet_lightning.tune.figures import figures
from pmet_lightning.tune.results import summary_lines
from pmet_lightning.tune.tuned import Tuned


def write_tuning_page(tuned: Tuned, path: Path) -> Path:
    """Write the page: what was chosen, what it does, what was tried, and what that took.

    Args:
        tuned: The result.
        path: File of the page.

    Returns:
        The path.
    """
    chosen = chosen_row(tuned)
    drawn = {name: svg(figure, f"tune-{name}") for name, figure in figures(tuned.rows, chosen).items()}
    values = {
        "tuned": tuned,
        "chosen": chosen,
        "summary": summary_lines(tuned),
        "figures": drawn,
        "costs": costs(tuned),
        "finalists": [
            {"layers": one.setting.layers, **vars(one.setting.target), **vars(one.setting.write), "own": one.outcome}
            for one in tuned.finalists
        ],
    }
    return write_page("tuned.html.jinja", values, path)


def chosen_row(tuned: Tuned) -> dict[str, Any]:
    """What was measured of the chosen setting on the tuning records, as a row of the table."""
    target, spread = tuned.sections["model"], tuned.sections["spread"]
    alike = [
        row
        for row in tuned.rows
        if row["stage"] == "finalists"
        and row["layers"] == target["layers"]
        and (row["optimize"], row["clamp"], row["targets"]) == (target["optimize"], target["clamp"], spread["targets"])
        and (row["lr"], row["lam"], row["rule"])
        == (target["optimizer"]["init_args"]["lr"], spread["lam"], spread["rule"])
    ]
    return dict(alike[0])


def costs(tuned: Tuned) -> list[dict[str, Any]]:
    """What each stage took: searches for targets, how often each was written, and seconds of each part."""
    found = []
    for stage, trials in tuned.trials.items():
        rows = [row for row in tuned.rows if row["stage"] == stage]
        seconds = {name: sum(row["seconds"][name] for row in rows) for name in ("targets", "write", "questions")}
        found.append({"stage": stage, "trials": trials, "writes": len(rows), **seconds})
    return found

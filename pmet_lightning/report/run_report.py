"""report.html and report.json: what a run did, on one page that needs nothing but a browser."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmet_lightning.evaluation.scores import CORE, KINDS
from pmet_lightning.evaluation.verdict import CAUSES
from pmet_lightning.report.captions import captions
from pmet_lightning.report.figures import MOST_RELATIONS, figures
from pmet_lightning.report.html import number, plain, svg, write_page
from pmet_lightning.report.run_data import known, rows_of, value_at
from pmet_lightning.report.tables import headline_suffix
from pmet_lightning.utils.files import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


WORST = 20  # number of edits in the table of the worst ones


def write_report(data: Mapping[str, Any], folder: Path, drawn: Mapping[str, Figure] | None = None) -> Path:
    """Write ``report.json`` and ``report.html``.

    Args:
        data: What the run did; every part of it may be missing.
        folder: Folder of the files; created if it does not exist.
        drawn: Its :func:`figures`, if they have been drawn already.

    Returns:
        The path of ``report.html``.
    """
    found = plain(data)
    values = {
        "data": found,
        "at": lambda *path: value_at(found, *path),
        "rows": {name: rows_of(found, name) for name in ("edits", "layers", "edit_batches", "relations")},
        "worst": worst(rows_of(found, "edits")),
        "causes": CAUSES,
        "headline": headline_suffix(value_at(found, "scores", "after") or value_at(found, "scores", "before") or {}),
        "plots": {name: svg(figure, name) for name, figure in (figures(found) if drawn is None else drawn).items()},
        "captions": captions(found),
        "most_relations": MOST_RELATIONS,
        "core": CORE,
        "kinds": KINDS,
    }
    write_json(folder / "report.json", found)
    return write_page("report.html.jinja", values, folder / "report.html")


def worst(edits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The edits that the page shows: those that are not said first, then those with the lowest mean score.

    Among equals, those with the most residual left come first.
    """

    def order(edit: dict[str, Any]) -> tuple[bool, float, float]:
        scores = known([number(value_at(edit, "after", name)) for name in CORE])
        left = known([number(edit.get("residual_left"))])
        mean = math.fsum(scores) / len(scores) if scores else math.inf
        return edit.get("said") is not False, mean, -left[0] if left else math.inf

    return sorted(edits, key=order)[:WORST]

"""The page of an analysis: the finding, the layers to edit, the figures with captions, the facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmet_lightning.analysis.captions import captions
from pmet_lightning.analysis.claims import Claim
from pmet_lightning.analysis.components import ANSWERS
from pmet_lightning.analysis.measures import LEAST_FACTS
from pmet_lightning.analysis.results import copy_line, proposal_lines, summary
from pmet_lightning.analysis.study import Findings
from pmet_lightning.report.html import plain, svg, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "analysis.html"
MOST_FACTS = 30  # on the page; all are in facts.csv


def write_analysis_page(
    folder: Path,
    settings: Mapping[str, Any],
    counts: Mapping[str, Any],
    phases: Sequence[Findings],
    claims: Sequence[Claim],
    drawn: Mapping[str, Figure],
) -> Path:
    """Write ``analysis.html``.

    Args:
        folder: The folder to write to.
        settings: The settings of the analysis.
        counts: Number of facts read, used and left out.
        phases: The findings of each phase.
        claims: The predictions and their results.
        drawn: The figures.

    Returns:
        The path of the page.
    """
    first, *_ = phases
    values = {
        **summary(settings, phases, claims),
        "counts": counts,
        "phases": [f.phase for f in phases],
        "proposals": [line for f in phases for line in proposal_lines(f, named=len(phases) > 1)],
        "copy": copy_line(first),
        "captions": captions(first, "Here" if len(phases) == 1 else "Before the edits"),
        "plots": {name: svg(figure, name) for name, figure in drawn.items()},
        "facts": [_fact(first, i) for i in range(min(MOST_FACTS, len(first.questions)))],
        "few": len(first.questions) < LEAST_FACTS,
    }
    return write_page("analysis.html.jinja", plain_but_plots(values), folder / PAGE)


def plain_but_plots(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as plain JSON values, but the figures as the markup that they are."""
    return {name: value if name == "plots" else plain(value) for name, value in values.items()}


def _fact(findings: Findings, i: int) -> dict[str, Any]:
    """A row of the table of facts."""
    fact, p = findings.questions[i].fact, findings.p[i].tolist()
    answer = fact.new if findings.answers[i] == "new" else fact.true
    return {
        "prompt": fact.prompt.replace("{}", fact.subject),
        "answer": answer,
        "p": p[ANSWERS.index(findings.answers[i])],
        "corrupted": p[-1],
    }

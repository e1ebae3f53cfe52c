"""The figures of a search: the Score against each setting, efficacy against specificity and damage, and all at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pmet_lightning.report.html import BLUE, GRID, INK, MUTED, ORANGE, STYLE, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
STAGES = {"layers": GRID, "settings": MUTED, "finalists": BLUE}
# Name of a setting: its title, and whether its axis is logarithmic.
SETTINGS = {
    "last": ("last layer edited", False),
    "width": ("layers edited", False),
    "optimize": ("delta on", False),
    "clamp": ("clamp", True),
    "lr": ("learning rate", True),
    "penalties": ("penalties", False),
    "targets": ("targets", False),
    "rule": ("spread rule", False),
    "lam": ("λ", True),
}
_WIDTH = 9.4  # inches


def figures(rows: Rows, chosen: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures by name: ``settings``, ``tradeoff`` and ``parallel``.

    Args:
        rows: All that was measured, as in trials.tsv.
        chosen: The chosen setting's row.
    """
    from matplotlib import rc_context

    found, own = [with_layers(row) for row in rows], with_layers(chosen)
    with rc_context(STYLE):
        return {
            "settings": _against_settings(found, own),
            "tradeoff": _tradeoff(found, own),
            "parallel": _parallel(found, own),
        }


def with_layers(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the last layer and the number of layers."""
    return {**row, "last": row["layers"][-1], "width": len(row["layers"])}


def _against_settings(rows: Rows, chosen: Mapping[str, Any]) -> Figure:
    figure, charts = panels(_WIDTH, 7.4, 3, 3, sharey=True)
    for axes, (name, (title, logarithmic)) in zip(charts, SETTINGS.items(), strict=True):
        places, labels = positions(rows, name)
        for stage, color in STAGES.items():
            own = [i for i, row in enumerate(rows) if row["stage"] == stage]
            axes.plot(
                [places[i] for i in own],
                [rows[i]["score"] for i in own],
                "o",
                ms=3,
                color=color,
                alpha=0.7,
                label=stage,
            )
        axes.plot([positions([*rows, chosen], name)[0][-1]], [chosen["score"]], "o", ms=7, mfc="none", color=ORANGE)
        axes.set(title=title, ylim=(-2, 102))
        if labels:
            axes.set_xticks(range(len(labels)), labels)
            axes.margins(x=0.2)
        elif logarithmic:
            _logarithmic(axes)
    for axes in charts[::3]:
        axes.set_ylabel("Score")
    figure.legend(*charts[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def positions(rows: Rows, name: str) -> tuple[list[float], list[str]]:
    """Where the values of a setting lie on its axis, and the labels of an axis of words or few numbers."""
    values = [row[name] for row in rows]
    if all(isinstance(value, float) for value in values):
        return [float(value) for value in values], []
    kinds = sorted(set(values), key=lambda value: (str(type(value)), value))
    return [float(kinds.index(value)) for value in values], [str(kind) for kind in kinds]


def _tradeoff(rows: Rows, chosen: Mapping[str, Any]) -> Figure:
    """Efficacy, and damage, against specificity, with what nothing exceeds in both as a line."""
    figure, (left, right) = panels(_WIDTH, 3.4, 1, 2)
    asked = [row for row in rows if row["specificity"] is not None]
    most = max((row["edits"] for row in asked), default=0)
    for axes, name, title in ((left, "efficacy", "efficacy"), (right, "kl", "KL of neighbors' answers")):
        for stage, color in STAGES.items():
            own = [row for row in asked if row["stage"] == stage]
            axes.plot(
                [row["specificity"] for row in own], [row[name] for row in own], "o", ms=3, color=color, label=stage
            )
        if chosen["specificity"] is not None:
            axes.plot([chosen["specificity"]], [chosen[name]], "o", ms=7, mfc="none", color=ORANGE)
        axes.set(title=title, xlabel="specificity")
    front = frontier([row for row in asked if row["edits"] == most])
    left.plot([row["specificity"] for row in front], [row["efficacy"] for row in front], color=INK, lw=1)
    left.legend(loc="lower left")
    return figure


def frontier(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows that no other exceeds in both efficacy and specificity, by specificity."""
    best, found = -1.0, []
    for row in sorted(rows, key=lambda row: (-row["specificity"], -row["efficacy"])):
        if row["efficacy"] > best:
            best = row["efficacy"]
            found.append(row)
    return found[::-1]


def _parallel(rows: Rows, chosen: Mapping[str, Any]) -> Figure:
    """A line for each setting over all axes; the darker, the higher its Score."""
    figure, (axes,) = panels(_WIDTH, 3.4, 1, 1)
    names, everything = [*SETTINGS, "score"], [*rows, chosen]
    columns = []
    for name in names:
        places, labels = positions(everything, name)
        logarithmic = SETTINGS.get(name, ("", False))[1]
        values = [math.log10(value) for value in places] if logarithmic else places
        low, high = (0.0, 100.0) if name == "score" else (min(values), max(values))
        columns.append([(value - low) / (high - low) if high > low else 0.5 for value in values])
        _label(axes, len(columns) - 1, labels or [f"{_end(low, logarithmic):g}", f"{_end(high, logarithmic):g}"])
    order = sorted(range(len(rows)), key=lambda i: rows[i]["score"])
    for i in order:
        strength = (rows[i]["score"] / 100) ** 3
        axes.plot([c[i] for c in columns], color=BLUE, lw=0.8, alpha=0.05 + 0.6 * strength)
    axes.plot([c[-1] for c in columns], color=ORANGE, lw=2)
    axes.set_xticks(range(len(names)), [*(title for title, _ in SETTINGS.values()), "Score"])
    axes.set_yticks([])
    axes.set_ylim(-0.08, 1.08)
    return figure


def _end(value: float, logarithmic: bool) -> float:
    return float(f"{10**value if logarithmic else value:.3g}")


def _label(axes: Axes, place: int, labels: Sequence[str]) -> None:
    """Write the values of an axis beside it."""
    for number, label in enumerate(labels):
        height = number / (len(labels) - 1) if len(labels) > 1 else 0.5
        axes.text(place + 0.04, height, label, fontsize=7, color=MUTED, va="center")

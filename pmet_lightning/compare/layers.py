"""What the methods of a comparison do layer by layer: the residual that is left, and the growth of the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pmet_lightning.report.html import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, STYLE, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = (INK, BLUE, ORANGE, GREEN, PURPLE, MUTED)
_TITLES = {"residual_after": "residual left after the write of each layer", "growth": "‖ΔW‖ / ‖W‖"}


def layer_means(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Means over the edit batches of some runs for each layer in which the FFN is written, in order.

    Args:
        reports: Contents of their report.json.

    Returns:
        For each layer ``layer``, ``residual_after``, relative to the start, and ``growth``; nothing without them.
    """
    found: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for report in reports:
        for row in report.get("layers") or ():
            if row.get("site") == "ffn" and row.get("residual_after") is not None:
                found[row["layer"]].append(row)
    return [
        {"layer": layer, **{name: fmean(row[name] for row in rows) for name in _TITLES}}
        for layer, rows in sorted(found.items())
    ]


def layer_plot(results: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A line over the layers for each method that writes layer by layer; ``None`` if none does.

    Args:
        results: Rows as in comparison.json, of one number of edits.
    """
    from matplotlib import rc_context

    drawn = [row for row in results if row.get("layers")]
    if not drawn:
        return None
    with rc_context(STYLE):
        figure, charts = panels(4.6, 5.2, len(_TITLES), 1, sharex=True)
        for axes, (name, title) in zip(charts, _TITLES.items(), strict=True):
            for i, row in enumerate(drawn):
                layers = [one["layer"] for one in row["layers"]]
                values = [one[name] for one in row["layers"]]
                style = "-" if i < len(_COLORS) else "--"
                axes.plot(layers, values, f"o{style}", color=_COLORS[i % len(_COLORS)], label=row["method"])
            axes.set_title(title)
            axes.set_ylim(bottom=0)
        charts[-1].set_xlabel("layer")
        charts[-1].locator_params("x", integer=True)
        figure.legend(*charts[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure

"""Pages that need nothing but a browser: their templates, their figures as inline SVG, their colors."""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmet_lightning.evaluation.scores import METRICS
from pmet_lightning.utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Colors of the light theme; in the page they are variables of the style sheet, which has a dark theme too.
COLORS = {
    **{"paper": "#ffffff", "ink": "#24303d", "muted": "#66727f", "grid": "#dde2e8"},
    **{"blue": "#2f6fb0", "orange": "#c8761a", "green": "#2e8b67", "purple": "#8457a6"},
}
PAPER, INK, MUTED, GRID, BLUE, ORANGE, GREEN, PURPLE = COLORS.values()
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), PAPER),
    **dict.fromkeys(("text.color", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), GRID),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left", "legend.frameon"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size", "xtick.minor.size", "ytick.minor.size"), 0),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **{"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "lines.markersize": 5},
    **{"text.usetex": False, "text.parse_math": False},  # a $ in a name is a $
}


def write_page(template: str, values: Mapping[str, Any], path: Path) -> Path:
    """Fill in a template of the package; every value is escaped.

    Args:
        template: Its file name.
        values: Variables of the template, besides ``metrics``, ``colors``, ``json`` and the filter ``shown``.
        path: File of the page.

    Returns:
        The path.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("pmet_lightning.report"), autoescape=True, trim_blocks=True)
    environment.filters["shown"] = shown
    shared = {
        "metrics": METRICS,
        "colors": COLORS,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
    }
    page = environment.get_template(template).render(**shared, **values)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def plain(value: Any) -> Any:
    """The same as plain JSON values: null for NaN and infinity, and text that can be encoded."""
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    return str(value).encode("utf-8", "replace").decode("utf-8")


def number(value: Any) -> float:
    """The value as a float, or NaN if it is no number."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def shown(value: Any, form: str = ".1f") -> str:
    """A number as it is shown on a page, or a dash."""
    if math.isnan(number(value)):
        return "–"
    text = format(float(value), form)
    return text.replace("-", "−") if text.strip("-0.%") else text.lstrip("-")  # -0.0 is shown as 0.0


def svg(figure: Figure, name: str) -> str:
    """A figure as an inline SVG element: unique ids, no date, text as text, colors of the style sheet."""
    from markupsafe import Markup
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # browsers have the fonts that matplotlib misses
        # Fix the layout, so that later drawings, for TensorBoard too, need not compute it again. With "none" matplotlib
        # would keep an empty engine, and draw once more for it.
        figure.draw_without_rendering()
        figure.set_layout_engine(None)
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    drawing = buffer.getvalue()
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing[drawing.index("<svg") :])  # ids that recur in every figure
    # Some of the other ids hold an address in memory.
    ids = {found: f"{name}-{i}" for i, found in enumerate(dict.fromkeys(re.findall(r'id="([^"]+)"', drawing)))}
    drawing = re.sub(r'(id="|#)([\w-]+)', lambda match: match[1] + ids.get(match[2], match[2]), drawing)
    for variable, color in COLORS.items():
        drawing = re.sub(rf"(fill|stroke): {color}", rf"\1: var(--{variable})", drawing)
    return Markup(drawing)


def write_svg(figure: Figure, path: Path) -> None:
    """Write a figure as an SVG file: text as text, no date, reproducible ids."""
    from matplotlib import rc_context

    with rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def panels(width: float, height: float, rows: int, columns: int, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure, in inches, with axes in rows and columns."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.04))
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)

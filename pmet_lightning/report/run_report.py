"""report.html and report.json: what a run did, on one page that needs nothing but a browser."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmet_lightning.evaluation.scores import CORE, KINDS, METRICS
from pmet_lightning.evaluation.verdict import CAUSES
from pmet_lightning.report.html import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    STYLE,
    number,
    panels,
    plain,
    svg,
    write_page,
)
from pmet_lightning.report.tables import headline_suffix
from pmet_lightning.utils.files import write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


WORST = 20  # number of edits in the table of the worst ones
MOST_RELATIONS = 30  # number of relations in their figure
_WIDTH, _HALF = 9.4, 4.6  # inches: a figure as wide as the page, and one of two side by side

_PARTS = {"loss": INK, "loss_nll": ORANGE, "loss_kl": BLUE, "loss_norm": PURPLE}
_CURVES = ("step", *_PARTS, "p", "active_edits")
_SITES = {"ffn": BLUE, "attn": ORANGE}
_REASONS = {
    "loss": ("loss low enough", GREEN),
    "argmax": ("target is first choice", BLUE),
    "steps": ("out of steps", ORANGE),
}


def figures(data: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of the report; those without data are left out.

    Args:
        data: What the run did; every part of it may be missing.

    Returns:
        ``loss_curves``, ``steps``, ``residual``, ``norms``, ``relations`` and ``forgetting``.
    """
    from matplotlib import rc_context

    makers = (_loss_curves, _steps, _residual, _norms, _relations, _forgetting)
    known = plain(data)
    with rc_context(STYLE):  # restores matplotlib's own settings afterward
        drawn = {make.__name__[1:]: make(known) for make in makers}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def write_report(data: Mapping[str, Any], folder: Path, drawn: Mapping[str, Figure] | None = None) -> Path:
    """Write ``report.json`` and ``report.html``.

    Args:
        data: What the run did; every part of it may be missing.
        folder: Folder of the files; created if it does not exist.
        drawn: Its :func:`figures`, if they have been drawn already.

    Returns:
        The path of ``report.html``.
    """
    known = plain(data)
    values = {
        "data": known,
        "at": lambda *path: _at(known, *path),
        "rows": {name: _rows(known, name) for name in ("edits", "layers", "edit_batches", "relations")},
        "worst": worst(_rows(known, "edits")),
        "causes": CAUSES,
        "headline": headline_suffix(_at(known, "scores", "after") or _at(known, "scores", "before") or {}),
        "plots": {name: svg(figure, name) for name, figure in (figures(known) if drawn is None else drawn).items()},
        "most_relations": MOST_RELATIONS,
        "core": CORE,
        "kinds": KINDS,
    }
    write_json(folder / "report.json", known)
    return write_page("report.html.jinja", values, folder / "report.html")


def _at(data: Any, *path: str) -> Any:
    """The value at a path of keys, or ``None``."""
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _rows(data: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in data.get(name) or [] if row]


def _column(rows: Sequence[Any], *path: str) -> list[float]:
    """A number of each row, or NaN."""
    return [number(_at(row, *path)) for row in rows]


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _short(text: Any, length: int = 26) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= length else f"{words[: length - 1]}…"


def worst(edits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The edits that the page shows: those that are not said first, then those with the lowest mean score.

    Among equals, those with the most residual left come first.
    """

    def order(edit: dict[str, Any]) -> tuple[bool, float, float]:
        scores = _known([number(_at(edit, "after", name)) for name in CORE])
        left = _known([number(edit.get("residual_left"))])
        mean = math.fsum(scores) / len(scores) if scores else math.inf
        return edit.get("said") is not False, mean, -left[0] if left else math.inf

    return sorted(edits, key=order)[:WORST]


def _loss_curves(data: Mapping[str, Any]) -> Figure | None:
    """Loss parts, P(target) and the number of active edits over the inner steps, one chart below the other."""
    steps = _inner_steps(_at(data, "curves") or {})
    columns = {name: _column(steps, name) for name in _CURVES}
    parts = {name: columns[name] for name in _PARTS if any(value > 0 for value in columns[name])}
    charts = (
        ("loss", 2.3, parts),
        ("p", 1.2, _known(columns["p"])),
        ("active_edits", 1.0, _known(columns["active_edits"])),
    )
    heights = {name: height for name, height, values in charts if values}
    if not heights:
        return None
    ratios = list(heights.values())
    figure, stacked = panels(_WIDTH, sum(ratios) + 0.4, len(ratios), 1, sharex=True, height_ratios=ratios)
    axes = dict(zip(heights, stacked, strict=True))
    if "loss" in axes:
        _draw_parts(axes["loss"], columns["step"], parts)
    if "p" in axes:
        axes["p"].plot(columns["step"], columns["p"], color=GREEN, label="p")
        axes["p"].set(title="P(target)", ylim=(0, 1.02))
    if "active_edits" in axes:
        axes["active_edits"].fill_between(columns["step"], columns["active_edits"], step="mid", color=MUTED, alpha=0.45)
        axes["active_edits"].set(title="edits still being optimized", ylim=(0, None))
    known = _known(columns["step"])
    stacked[-1].set_xlim(min(known) - 1, max(known) + 1)
    stacked[-1].set_xlabel("inner step of the edits that are optimized together")
    return figure


def _inner_steps(curves: Mapping[str, Any]) -> list[dict[str, float]]:
    """A mapping for each step, and an empty one before each later edit batch, so that lines have a gap there."""
    steps: list[dict[str, float]] = []
    for index, values in enumerate(zip_longest(*(curves.get(name) or [] for name in _CURVES))):
        step = dict(zip(_CURVES, map(number, values), strict=True))
        step["step"] = float(index) if math.isnan(step["step"]) else step["step"]
        if steps and step["active_edits"] > steps[-1]["active_edits"]:
            steps.append({})
        steps.append(step)
    return steps


def _draw_parts(ax: Axes, steps: Sequence[float], parts: Mapping[str, Sequence[float]]) -> None:
    """The parts of the loss, on a logarithmic axis if they span much; tiny values are below its range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name, values in parts.items():
        width = 2.6 if name == "loss" else 1.2  # so that the loss shows where it equals one of its parts
        ax.plot(steps, values, color=_PARTS[name], lw=width, label=name.removeprefix("loss_"))
    positive = [value for values in parts.values() for value in values if value > 0]
    top, low = max(positive), max(min(positive), max(positive) * 1e-4)
    if top > 20 * low:
        ax.set_yscale("log", nonpositive="mask")
        ax.set_ylim(low / 1.3, top * 1.3)
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if top > 100 * low else (1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_title("loss and its parts")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(parts), borderaxespad=0.2)


def _steps(data: Mapping[str, Any]) -> Figure | None:
    """How many steps the edits took, stacked by why they stopped, and the number of edits for each reason."""
    edits = [edit for edit in _rows(data, "edits") if edit.get("stop_reason") and edit.get("steps") is not None]
    if not edits:
        return None
    reasons = Counter(str(edit["stop_reason"]) for edit in edits)
    names = [name for name in _REASONS if name in reasons] + sorted(set(reasons) - set(_REASONS))
    figure, (left, right) = panels(_WIDTH, 2.6, 1, 2, width_ratios=(1.7, 1))
    below: Counter[int] = Counter()
    for index, name in enumerate(names):
        label, color = _REASONS.get(name, (_short(name), MUTED))
        taken = Counter(int(edit["steps"]) for edit in edits if str(edit["stop_reason"]) == name)
        left.bar(list(taken), list(taken.values()), 0.85, [below[step] for step in taken], color=color, label=label)
        below.update(taken)
        right.bar_label(right.barh(index, reasons[name], 0.6, color=color, label=label), padding=4)
    left.set(title="edits by the steps they took", xlabel="steps")
    right.set(title="why they stopped", xlabel="edits", xlim=(0, 1.15 * max(reasons.values())))
    right.set_yticks(range(len(names)), [_REASONS.get(name, (_short(name),))[0] for name in names], color=INK)
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    left.locator_params(integer=True)
    right.locator_params("x", integer=True)
    return figure


def _residual(data: Mapping[str, Any]) -> Figure | None:
    """The residual left before the write of each layer and, for the FFN, at the end."""
    left: dict[int, list[float]] = {}
    for edit in _rows(data, "edits"):
        left.setdefault(edit.get("edit_batch") or 0, []).extend(_known([number(edit.get("residual_left"))]))
    ends = {("ffn", batch): math.fsum(values) / len(values) for batch, values in left.items() if values}
    return _over_layers(data, "residual", "residual, relative to the start", ends)


def _norms(data: Mapping[str, Any]) -> Figure | None:
    return _over_layers(data, "norm_ratio", "‖ΔW‖ / ‖W‖", {})


def _over_layers(
    data: Mapping[str, Any], field: str, title: str, ends: Mapping[tuple[str, int], float]
) -> Figure | None:
    """One line for each site and edit batch, the earlier ones fainter; ``ends`` has a point after the last layer."""
    rows = [row for row in _rows(data, "layers") if row.get(field) is not None and row.get("layer") is not None]
    if not rows:
        return None
    layers = sorted({row["layer"] for row in rows})
    lines: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        line = lines.setdefault((str(row.get("site") or "any site"), row.get("edit_batch") or 0), {})
        line[layers.index(row["layer"])] = row[field]
    batches = sorted({batch for _, batch in lines})
    figure, (ax,) = panels(_HALF, 2.9, 1, 1)
    for (site, batch), line in sorted(lines.items()):
        points = sorted(line.items()) + [(len(layers), ends[key]) for key in [(site, batch)] if key in ends]
        named = batch in (batches[0], batches[-1])  # a legend of many lines would be unreadable
        label = f"{site}, edit batch {batch}" if len(batches) > 1 else site
        strength = 0.4 + 0.6 * (batches.index(batch) + 1) / len(batches)
        ax.plot(*zip(*points, strict=True), "o-", color=_SITES.get(site, PURPLE), alpha=strength,
                label=label if named else f"_{label}")  # fmt: skip
    ticks = {index: str(layers[index]) for index in range(0, len(layers), 1 + len(layers) // 16)}
    ticks |= {len(layers): "end"} if any(key in ends for key in lines) else {}
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.margins(x=0.06, y=0.08)
    ax.set(title=title, xlabel="layer", ylim=(0, None))
    ax.legend()
    return figure


def _pairs(rows: Sequence[Any], phases: tuple[str, str], names: Sequence[str]) -> dict[str, list[list[float]]]:
    """For each score that is known at all, a column of values for each of two phases."""
    pairs = {name: [_column(rows, phase, name) for phase in phases] for name in names}
    return {name: pair for name, pair in pairs.items() if _known(pair[0] + pair[1])}


def _relations(data: Mapping[str, Any]) -> Figure | None:
    """Efficacy and specificity of the most frequent relations, before and after."""
    rows = sorted(_rows(data, "relations"), key=lambda row: -(row.get("count") or 0))[:MOST_RELATIONS]
    pairs = _pairs(rows, ("before", "after"), ("efficacy", "specificity"))
    if not pairs:
        return None
    figure, axes = panels(_WIDTH, 0.9 + 0.27 * len(rows), 1, len(pairs), sharey=True)
    heights = range(len(rows))
    for ax, (name, (before, after)) in zip(axes, pairs.items(), strict=True):
        _two_marks(ax, (before, heights), (after, heights), ("before", "after"))
        ax.set(title=name, xlim=(-3, 103))
    counts = [f" ({row['count']})" if row.get("count") else "" for row in rows]
    labels = [_short(row.get("relation") or "no relation") + count for row, count in zip(rows, counts, strict=True)]
    axes[0].set_yticks(heights, labels, color=INK)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _forgetting(data: Mapping[str, Any]) -> Figure | None:
    """Scores of each of several edit batches, right after it was written and after all of them."""
    rows = _rows(data, "edit_batches")
    pairs = _pairs(rows, ("at_once", "at_the_end"), METRICS)
    if len(rows) < 2 or not pairs:
        return None
    numbers = [i if row.get("edit_batch") is None else row["edit_batch"] for i, row in enumerate(rows)]
    figure, axes = panels(_WIDTH, 2.6, 1, len(pairs), sharey=True)
    for ax, (name, (at_once, at_the_end)) in zip(axes, pairs.items(), strict=True):
        _two_marks(ax, (numbers, at_once), (numbers, at_the_end), ("right after writing", "at the end"))
        ax.margins(x=0.15 if len(rows) < 10 else 0.05, y=0.1)
        ax.set(title="Score" if name == "score" else name, xlabel="edit batch")
        ax.locator_params("x", integer=True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _two_marks(ax: Axes, earlier: Sequence[Any], later: Sequence[Any], labels: tuple[str, str]) -> None:
    """A ring for the earlier value, a disc for the later one, a line between them."""
    ax.plot([earlier[0], later[0]], [earlier[1], later[1]], color=MUTED, alpha=0.5, lw=2, zorder=1)
    ax.plot(*earlier, "o", color=MUTED, markerfacecolor=PAPER, markeredgewidth=1.3, label=labels[0])
    ax.plot(*later, "o", color=BLUE, label=labels[1])

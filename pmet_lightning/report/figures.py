"""The figures of a run's report: each half as wide as the page, so that a narrow screen can stack them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pmet_lightning.evaluation.scores import METRICS
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
)
from pmet_lightning.report.run_data import by_batch, column, known, rows_of, value_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Drawn = Iterator[tuple[str, Figure]]


MOST_RELATIONS = 30  # number of relations in their figures
MOST_BATCHES = 8  # number of edit batches that have curves of their own
_WIDTH, _HEIGHT = 4.6, 2.9  # inches

_PARTS = {"loss_nll": ORANGE, "loss_kl": BLUE, "loss_norm": PURPLE}
_SITES = {"ffn": BLUE, "attn": ORANGE}
REASONS = {"loss": "loss low enough", "argmax": "target is first choice", "steps": "out of steps"}
_REASON_COLORS = {"loss": GREEN, "argmax": BLUE, "steps": ORANGE}


def figures(data: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of the report; those without data are left out.

    Args:
        data: What the run did; every part of it may be missing.

    Returns:
        ``loss``, ``probability``, ``steps``, ``stop_reasons``, ``residual``, ``norms``, ``relations_efficacy``,
        ``relations_specificity`` and, for each score, ``forgetting_{score}``.
    """
    from matplotlib import rc_context

    makers = (_targets, _steps, _layers, _relations, _forgetting)
    found = plain(data)
    with rc_context(STYLE):  # restores matplotlib's own settings afterward
        return {name: figure for make in makers for name, figure in make(found)}


def short(text: Any, length: int = 26) -> str:
    """The text on one line, cut if it is long."""
    words = " ".join(str(text).split())
    return words if len(words) <= length else f"{words[: length - 1]}…"


def _targets(data: Mapping[str, Any]) -> Drawn:
    """The loss, with the number of edits that are still being optimized, and P(target), step by step."""
    batches = by_batch(value_at(data, "curves") or {})
    numbers = shown_batches(len(batches))
    drawn = [batches[i] for i in numbers]
    if any(known(column(points, "loss")) for points in drawn):
        active = _active(batches)
        ratios = (2.4, 1.0) if active else (1.0,)
        figure, axes = panels(_WIDTH, 3.6 if active else _HEIGHT, len(ratios), 1, sharex=True, height_ratios=ratios)
        _draw_loss(axes[0], drawn, numbers)
        if active:
            axes[1].fill_between(range(len(active)), active, step="mid", color=MUTED, alpha=0.45)
            axes[1].set(title="edits still being optimized", ylim=(0, None))
            axes[1].locator_params("y", integer=True, nbins=3)
        axes[-1].set_xlabel("step of the search" if active else "epoch")
        yield "loss", figure
    if any(known(column(points, "p")) for points in drawn):
        figure, (ax,) = panels(_WIDTH, _HEIGHT, 1, 1)
        _draw_means(ax, drawn, "p", GREEN, numbers)
        ax.set(title="P(target), mean over all edits", ylim=(0, 1.02))
        ax.set_xlabel("step of the search" if _active(batches) else "epoch")
        yield "probability", figure


def shown_batches(count: int) -> list[int]:
    """Numbers of the edit batches that have curves of their own, evenly from the first to the last."""
    if count <= MOST_BATCHES:
        return list(range(count))
    return [round(i * (count - 1) / (MOST_BATCHES - 1)) for i in range(MOST_BATCHES)]


def _active(batches: Sequence[Sequence[Mapping[str, float]]]) -> list[float]:
    """How many edits of all edit batches took each step."""
    counts = [known(column(points, "active_edits")) for points in batches]
    return [sum(own[step] for own in counts if step < len(own)) for step in range(max(map(len, counts), default=0))]


def _draw_loss(ax: Axes, batches: Sequence[Sequence[Any]], numbers: Sequence[int]) -> None:
    """The mean loss, and its parts if they are several, on a logarithmic axis if it spans much."""
    _draw_means(ax, batches, "loss", INK, numbers)
    parts = {name: column(batches[0], name) for name in _PARTS} if len(batches) == 1 else {}
    parts = {name: values for name, values in parts.items() if any(value > 0 for value in values)}
    if len(parts) > 1:  # a single part is the loss itself
        for name, values in parts.items():
            ax.plot(column(batches[0], "step"), values, color=_PARTS[name], lw=1.2, label=name.removeprefix("loss_"))
    curves = [*(column(points, "loss") for points in batches), *(parts.values() if len(parts) > 1 else ())]
    _scale([value for values in curves for value in known(values)], ax)
    ax.set_title("loss, mean over all edits")
    if len(ax.lines) > 1:
        ax.legend(loc="best", fontsize="small")


def _draw_means(ax: Axes, batches: Sequence[Sequence[Any]], name: str, color: str, numbers: Sequence[int]) -> None:
    """A line for each edit batch, the earlier ones fainter; of a single one, the band of the middle half as well."""
    for index, points in enumerate(batches):
        steps, label = column(points, "step"), "mean" if len(batches) == 1 else f"edit batch {numbers[index]}"
        named = index in (0, len(batches) - 1)  # a legend of many lines would be unreadable
        strength = 0.3 + 0.7 * (index + 1) / len(batches)
        # A search of one step is a point.
        ax.plot(steps, column(points, name), "o-" if len(steps) == 1 else "-", color=color, lw=1.8, alpha=strength,
                label=label if named else f"_{label}")  # fmt: skip
    low, high = (column(batches[0], f"{name}_{level}") for level in ("q25", "q75"))
    if len(batches) == 1 and known(low):
        ax.fill_between(column(batches[0], "step"), low, high, color=color, alpha=0.15, lw=0)
    ax.locator_params("x", integer=True)
    if name == "p" and len(batches) > 1:
        ax.legend(loc="best", fontsize="small")


def _scale(values: Sequence[float], ax: Axes) -> None:
    """A logarithmic axis if positive values span much; tiny ones are below its range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [value for value in values if value > 0]
    if not positive:
        return
    top, low = max(positive), max(min(positive), max(positive) * 1e-4)
    if top > 20 * low:
        ax.set_yscale("log", nonpositive="clip")
        ax.set_ylim(low / 1.3, top * 1.3)
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if top > 100 * low else (1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(0, None)


def _steps(data: Mapping[str, Any]) -> Drawn:
    """How many steps the edits took, stacked by why they stopped, and the number of edits for each reason."""
    edits = [edit for edit in rows_of(data, "edits") if edit.get("stop_reason") and edit.get("steps") is not None]
    if not edits:
        return
    reasons = Counter(str(edit["stop_reason"]) for edit in edits)
    names = [name for name in REASONS if name in reasons] + sorted(set(reasons) - set(REASONS))
    labels = [REASONS.get(name, short(name)) for name in names]
    colors = [_REASON_COLORS.get(name, MUTED) for name in names]
    figure, (ax,) = panels(_WIDTH, _HEIGHT, 1, 1)
    below: Counter[int] = Counter()
    for name, label, color in zip(names, labels, colors, strict=True):
        taken = Counter(int(edit["steps"]) for edit in edits if str(edit["stop_reason"]) == name)
        ax.bar(list(taken), list(taken.values()), 0.85, [below[step] for step in taken], color=color, label=label)
        below.update(taken)
    ax.set(title="edits by the steps they took", xlabel="steps", xlim=(0, max(below) + 1))
    ax.locator_params(integer=True)
    yield "steps", figure
    figure, (ax,) = panels(_WIDTH, _HEIGHT, 1, 1)
    for index, (name, label, color) in enumerate(zip(names, labels, colors, strict=True)):
        ax.bar_label(ax.barh(index, reasons[name], 0.6, color=color, label=label), padding=4)
    ax.set(title="why they stopped", xlabel="edits", xlim=(0, 1.15 * max(reasons.values())))
    ax.set_yticks(range(len(names)), labels, color=INK)
    ax.set_ylim(max(len(names), 3) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.locator_params("x", integer=True)
    yield "stop_reasons", figure


def _layers(data: Mapping[str, Any]) -> Drawn:
    """The residual left before the write of each layer and, for the FFN, at the end; and the sizes of the updates."""
    ends = {("ffn", batch): math.fsum(values) / len(values) for batch, values in residuals_left(data).items() if values}
    charts = {"residual": ("residual, relative to the start", ends), "norms": ("‖ΔW‖ / ‖W‖", {})}
    for name, (title, points) in charts.items():
        figure = _over_layers(data, {"norms": "norm_ratio"}.get(name, name), title, points)
        if figure is not None:
            yield name, figure


def residuals_left(data: Mapping[str, Any]) -> dict[int, list[float]]:
    """The residuals left at the end of the edits of each edit batch."""
    left: dict[int, list[float]] = {}
    for edit in rows_of(data, "edits"):
        left.setdefault(edit.get("edit_batch") or 0, []).extend(known([number(edit.get("residual_left"))]))
    return left


def _over_layers(
    data: Mapping[str, Any], field: str, title: str, ends: Mapping[tuple[str, int], float]
) -> Figure | None:
    """One line for each site and edit batch, the earlier ones fainter; ``ends`` has a point after the last layer."""
    rows = [row for row in rows_of(data, "layers") if row.get(field) is not None and row.get("layer") is not None]
    if not rows:
        return None
    layers = sorted({row["layer"] for row in rows})
    lines: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        line = lines.setdefault((str(row.get("site") or "any site"), row.get("edit_batch") or 0), {})
        line[layers.index(row["layer"])] = row[field]
    batches = sorted({batch for _, batch in lines})
    figure, (ax,) = panels(_WIDTH, _HEIGHT, 1, 1)
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
    if len(lines) > 1:
        ax.legend()
    return figure


def _pairs(rows: Sequence[Any], phases: tuple[str, str], names: Sequence[str]) -> dict[str, list[list[float]]]:
    """For each score that is known at all, a column of values for each of two phases."""
    pairs = {name: [column(rows, phase, name) for phase in phases] for name in names}
    return {name: pair for name, pair in pairs.items() if known(pair[0] + pair[1])}


def _relations(data: Mapping[str, Any]) -> Drawn:
    """Efficacy and specificity of the most frequent relations, before and after."""
    rows = sorted(rows_of(data, "relations"), key=lambda row: -(row.get("count") or 0))[:MOST_RELATIONS]
    counts = [f" ({row['count']})" if row.get("count") else "" for row in rows]
    labels = [short(row.get("relation") or "no relation") + count for row, count in zip(rows, counts, strict=True)]
    heights = range(len(rows))
    for name, (before, after) in _pairs(rows, ("before", "after"), ("efficacy", "specificity")).items():
        figure, (ax,) = panels(_WIDTH, 1.0 + 0.27 * len(rows), 1, 1)
        _two_marks(ax, (before, heights), (after, heights), ("before", "after"))
        ax.set(title=name, xlim=(-3, 103))
        ax.set_yticks(heights, labels, color=INK)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=2)
        yield f"relations_{name}", figure


def _forgetting(data: Mapping[str, Any]) -> Drawn:
    """Scores of each of several edit batches, right after it was written and after all of them."""
    rows = rows_of(data, "edit_batches")
    if len(rows) < 2:
        return
    numbers = [i if row.get("edit_batch") is None else row["edit_batch"] for i, row in enumerate(rows)]
    for name, (at_once, at_the_end) in _pairs(rows, ("at_once", "at_the_end"), METRICS).items():
        figure, (ax,) = panels(_WIDTH, _HEIGHT, 1, 1)
        _two_marks(ax, (numbers, at_once), (numbers, at_the_end), ("right after writing", "at the end"))
        ax.margins(x=0.15 if len(rows) < 10 else 0.05, y=0.1)
        ax.set(title="Score" if name == "score" else name, xlabel="edit batch")
        ax.locator_params("x", integer=True)
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=2)
        yield f"forgetting_{name}", figure


def _two_marks(ax: Axes, earlier: Sequence[Any], later: Sequence[Any], labels: tuple[str, str]) -> None:
    """A ring for the earlier value, a disc for the later one, a line between them."""
    ax.plot([earlier[0], later[0]], [earlier[1], later[1]], color=MUTED, alpha=0.5, lw=2, zorder=1)
    ax.plot(*earlier, "o", color=MUTED, markerfacecolor=PAPER, markeredgewidth=1.3, label=labels[0])
    ax.plot(*later, "o", color=BLUE, label=labels[1])

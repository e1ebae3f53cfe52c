"""The figures of an analysis: similarities, logit lens and contributions by layer, causal tracing as heat maps.

Each is half as wide as the page, its charts below each other: two stand side by side, or one on a narrow screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context

from pmet_lightning.analysis.components import ATTN, COMPONENTS, FFN, LAST, SUBJECT, TOKENS
from pmet_lightning.analysis.facts import NEW, TRUE
from pmet_lightning.analysis.layer_choice import NO_EVIDENCE
from pmet_lightning.analysis.measures import LEAST_FACTS, TOO_FEW, summarize
from pmet_lightning.analysis.study import Findings
from pmet_lightning.analysis.tracing import LAST_TOKEN, POSITIONS, RESTORED, SUBJECT_LAST
from pmet_lightning.report.html import BLUE, GREEN, ORANGE, PURPLE, STYLE, panels, write_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor


_WIDTH, _HEIGHT = 4.6, 2.1  # inches: of a figure, and of one of its charts
_LEGEND = 0.3  # above the charts
_COLORS = {ATTN: ORANGE, FFN: BLUE, TRUE: GREEN, NEW: PURPLE}
_LINES = {"before": "-", "after": "--"}
_TITLES = {SUBJECT: "subject's last token", LAST: "prompt's last token"}
PLACES = {SUBJECT: SUBJECT_LAST, LAST: LAST_TOKEN}
_NAMES = {ATTN: "attention", FFN: "FFN"}
_RESTORED = {"hidden": "residual stream", ATTN: "attention output", FFN: "FFN output"}


def figures(phases: Sequence[Findings]) -> dict[str, Figure]:
    """The figures of one or two phases: ``similarity``, ``lens``, ``contribution``, ``effect`` and ``tracing``.

    Args:
        phases: The findings of each phase.
    """
    with rc_context(STYLE):
        drawn = {"similarity": _similarity(phases), "lens": _lens(phases), "contribution": _contribution(phases)}
        if "effect" in phases[0].measures:
            drawn |= {"effect": _effect(phases), "tracing": _tracing(phases)}
        if (count := len(phases[0].questions)) < LEAST_FACTS:
            for figure in drawn.values():
                text = f"Facts: {count}. No intervals: {TOO_FEW}\nhow others would differ"
                figure.suptitle(text, x=0.01, ha="left", fontsize="medium")
    return drawn


def write_figures(drawn: Mapping[str, Figure], folder: Path) -> None:
    """Write figures as SVG files and as TensorBoard events."""
    from torch.utils.tensorboard import SummaryWriter

    for name, figure in drawn.items():
        write_svg(figure, folder / f"{name}.svg")
    with SummaryWriter(str(folder)) as board:
        for name, figure in drawn.items():
            board.add_figure(f"analysis/{name}", figure)


def _line(ax: Axes, values_NL: Tensor, label: str, name: str, phase: str) -> None:
    """Draw the mean over facts by layer, with its 95 % interval if there are enough; nothing if no fact has values."""
    if values_NL.isnan().all():
        return
    mean, low, high, count = (column.tolist() for column in summarize(values_NL))
    layers = range(len(mean))
    ax.plot(layers, mean, _LINES[phase], color=_COLORS[name], label=label)
    if min(count) >= LEAST_FACTS:
        ax.fill_between(layers, low, high, color=_COLORS[name], alpha=0.15, lw=0)


def _finish(figure: Figure, axes: Sequence[Axes]) -> Figure:
    axes[-1].set_xlabel("layer")
    for ax in axes:
        ax.locator_params("x", integer=True)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _column(charts: int, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with charts over layers below each other."""
    return panels(_WIDTH, _LEGEND + _HEIGHT * charts, charts, 1, sharex=True, **options)


def _label(name: str, findings: Findings, phases: Sequence[Findings]) -> str:
    return f"{name} {findings.phase}" if len(phases) > 1 else name


def _similarity(phases: Sequence[Findings]) -> Figure:
    """Cosine similarity and overlap of each component's input and output."""
    figure, axes = _column(4)
    names = {"cosine": "cosine of input and output", "overlap": "overlap of their projections"}
    for i, (measure, title) in enumerate(names.items()):
        for ax, token in zip(axes[2 * i : 2 * i + 2], TOKENS, strict=True):
            for findings in phases:
                for component in COMPONENTS:
                    values = findings.measures[measure].at(token=token, component=component)
                    _line(ax, values, _label(_NAMES[component], findings, phases), component, findings.phase)
            ax.set_title(f"{title}, {_TITLES[token]}")
    return _finish(figure, axes)


def _lens(phases: Sequence[Findings]) -> Figure:
    """P of the answers if the model ended after a layer."""
    figure, axes = _column(2, sharey=True)
    for ax, token in zip(axes, TOKENS, strict=True):
        for findings in phases:
            for answer in (TRUE, NEW):
                values = findings.measures["lens"].at(token=token, answer=answer)
                _line(ax, values, _label(f"{answer} answer", findings, phases), answer, findings.phase)
        ax.set(title=f"P under the logit lens, {_TITLES[token]}", ylim=(-0.02, 1.02))
    return _finish(figure, axes)


def _contribution(phases: Sequence[Findings]) -> Figure:
    """What each component adds to the logit of the tracked answer."""
    figure, axes = _column(2)
    for ax, token in zip(axes, TOKENS, strict=True):
        ax.axhline(0, color=STYLE["xtick.color"], lw=0.8)
        for findings in phases:
            for component in COMPONENTS:
                values = findings.of_followed("contribution", token=token, component=component)
                _line(ax, values, _label(_NAMES[component], findings, phases), component, findings.phase)
        ax.set_title(f"added to the answer's logit, {_TITLES[token]}")
    return _finish(figure, axes)


def _effect(phases: Sequence[Findings]) -> Figure:
    """The indirect effect of attention and FFN with intervals, and the proposed layers."""
    figure, axes = _column(2, sharey=True)
    proposal = phases[0].proposal()
    if proposal is not None and proposal.verdict != NO_EVIDENCE:
        axes[0].axvspan(proposal.layers[0] - 0.5, proposal.layers[-1] + 0.5, color=STYLE["grid.color"], alpha=0.6, lw=0)
    for ax, token in zip(axes, TOKENS, strict=True):
        ax.axhline(0, color=STYLE["xtick.color"], lw=0.8)
        for findings in phases:
            for component in COMPONENTS:
                values = findings.measures["effect"].at(component=component, place=PLACES[token])
                _line(ax, values, _label(_NAMES[component], findings, phases), component, findings.phase)
        ax.set_title(f"rise of P(answer) when restored, {_TITLES[token]}")
    return _finish(figure, axes)


def _tracing(phases: Sequence[Findings]) -> Figure:
    """Heat maps of the indirect effect, one for each component in each phase."""
    figure, axes = panels(_WIDTH, 0.4 + 1.75 * len(RESTORED) * len(phases), len(phases) * len(RESTORED), 1, sharex=True)
    maps = [f.measures["effect"].at(component=site).nanmean(dim=0).T for f in phases for site in RESTORED]
    titles = [(f, site) for f in phases for site in RESTORED]
    largest = max(float(values.nan_to_num().max()) for values in maps)
    image: Any = None
    for ax, values, (findings, site) in zip(axes, maps, titles, strict=True):
        limit = max(largest, 1e-9)
        image = ax.imshow(values.tolist(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        ax.set_title(_label(_RESTORED[site], findings, phases))
        ax.set_yticks(range(len(POSITIONS)), list(POSITIONS))
        ax.grid(visible=False)
        ax.locator_params("x", integer=True)
    axes[-1].set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="rise of P(answer)", location="bottom", aspect=40, shrink=0.8)
    return figure

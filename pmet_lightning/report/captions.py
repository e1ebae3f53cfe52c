"""What the figures of a run show, in words: sentences made of the same data, so that they cannot contradict them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pmet_lightning.evaluation.scores import METRICS
from pmet_lightning.report.figures import MOST_BATCHES, MOST_RELATIONS, residuals_left
from pmet_lightning.report.html import number, plain, shown
from pmet_lightning.report.run_data import by_batch, column, known, rows_of, value_at

MANY = 0.1  # a share of the edits that is worth a remedy
ALL_LEFT = 0.8  # of the residual, before the last layer is written: the writes below it hardly show
MOST_LEFT = 0.5  # of the residual: from here on the weights hold less than half of the change
_NAMES = {"score": "Score"}
_REASONS = {
    "argmax": "stopped because the target had become what the model would say",
    "loss": "stopped because the loss was low enough",
    "steps": "ran out of steps",
}


def captions(data: Mapping[str, Any]) -> dict[str, str]:
    """A sentence or more for each group of figures that has data.

    Args:
        data: What the run did; every part of it may be missing.

    Returns:
        ``targets``, ``steps``, ``residual``, ``norms``, ``relations`` and ``forgetting``.
    """
    makers = (_targets, _steps, _residual, _norms, _relations, _forgetting)
    found = plain(data)
    told = {make.__name__[1:]: make(found) for make in makers}
    return {name: text for name, text in told.items() if text}


def _targets(data: Mapping[str, Any]) -> str:
    batches = by_batch(value_at(data, "curves") or {})
    sentences = []
    for name, title, form in (("loss", "the loss", ".2f"), ("p", "P(target)", ".2f")):
        ends = [_ends(points, name) for points in batches]
        weights = [number(points[0].get("active_edits", 1.0)) for points in batches]
        pairs = [(pair, weight) for pair, weight in zip(ends, weights, strict=True) if pair is not None]
        if pairs:
            first, last = (_mean([pair[i] for pair, _ in pairs], [weight for _, weight in pairs]) for i in (0, 1))
            sentences.append(f"{title} went from {shown(first, form)} to {shown(last, form)}")
    if not sentences:
        return ""
    step = "step" if value_at(data, "curves", "active_edits") else "epoch"
    text = f"From the first to the last {step} {' and '.join(sentences)}."
    if len(batches) > 1:
        lines = f"{MOST_BATCHES} of the {len(batches)}" if len(batches) > MOST_BATCHES else f"the {len(batches)}"
        return f"{text} There is a line for each of {lines} edit batches, the later the stronger."
    has_band = batches and known(column(batches[0], "loss_q25"))
    return f"{text} The band holds the middle half of the edits." if has_band else text


def _ends(points: Sequence[Mapping[str, float]], name: str) -> tuple[float, float] | None:
    """The first and the last value of a curve."""
    values = known(column(points, name))
    return (values[0], values[-1]) if values else None


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    weights = [1.0] * len(values) if weights is None else weights
    return math.fsum(map(float.__mul__, map(float, values), map(float, weights))) / math.fsum(weights)


def _steps(data: Mapping[str, Any]) -> str:
    reasons = Counter(str(edit["stop_reason"]) for edit in rows_of(data, "edits") if edit.get("stop_reason"))
    count = sum(reasons.values())
    if not count:
        return ""
    parts = [f"{reasons[name]} {words}" for name, words in _REASONS.items() if reasons[name]]
    parts += [f"{reasons[name]} stopped for another reason ({name})" for name in sorted(set(reasons) - set(_REASONS))]
    text = f"Of {count} edits, {_listed(parts)}."
    if reasons["steps"] < MANY * count:
        return text
    return f"{text} More steps, a larger learning rate or a larger clamp may find what these did not."


def _residual(data: Mapping[str, Any]) -> str:
    left = [value for values in residuals_left(data).values() for value in values]
    rows = [row for row in rows_of(data, "layers") if row.get("residual") is not None and row.get("layer") is not None]
    if not left or not rows:
        return ""
    mean = _mean(left)
    text = f"At the end {shown(100 * mean, '.0f')} % of the change is missing, on average over {len(left)} edits."
    last = max(row["layer"] for row in rows)
    before_last = _mean([row["residual"] for row in rows if row["layer"] == last])
    if before_last >= ALL_LEFT > MOST_LEFT > mean and any(row["layer"] != last for row in rows):
        text += (
            " The writes below the last layer add to the residual stream, and hardly show here, where the output of "
            "the last layer is measured."
        )
    return f"{text} A smaller λ, fewer edits or more layers would leave less." if mean >= MOST_LEFT else text


def _norms(data: Mapping[str, Any]) -> str:
    rows = [row for row in rows_of(data, "layers") if row.get("norm_ratio") is not None and "layer" in row]
    if not rows:
        return ""
    largest, smallest = (pick(rows, key=lambda row: float(row["norm_ratio"])) for pick in (max, min))
    text = f"The largest update, {_where(largest, rows)}, is {largest['norm_ratio']:.2g} times as large as its weight"
    if smallest["norm_ratio"] > 0 and len(rows) > 1:
        text += f", the smallest, {_where(smallest, rows)}, {smallest['norm_ratio']:.2g} times"
    factor = value_at(data, "verdict", "perplexity_factor")
    if not isinstance(factor, (int, float)):
        return f"{text}. Whether that disturbs other text was not measured."
    effect = f"perplexity of unrelated text × {factor:.3g}"
    if value_at(data, "verdict", "damage") in ("warning", "damaged"):
        return f"{text}. That is too much for this model ({effect}): a larger λ makes the updates smaller."
    return f"{text}. No size is too large in itself; what counts is what becomes of other text: here {effect}."


def _where(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Layer of an update and, if there are several, its site and edit batch."""
    words = [f"in layer {row['layer']}"]
    words += [f"of {row.get('site')}"] if len({other.get("site") for other in rows}) > 1 else []
    words += [f"in edit batch {row.get('edit_batch')}"] if len({other.get("edit_batch") for other in rows}) > 1 else []
    return " ".join(words)


def _relations(data: Mapping[str, Any]) -> str:
    rows = sorted(rows_of(data, "relations"), key=lambda row: -(row.get("count") or 0))[:MOST_RELATIONS]
    sentences = []
    lowest = _lowest(rows, "efficacy")
    if lowest is not None:
        value, names = lowest
        if value == 100:
            sentences.append("Efficacy is 100 for every kind of fact.")
        else:
            sentences.append(f"Efficacy is lowest, {shown(value, '.0f')}, for {names}.")
    lowest = _lowest(rows, "specificity")
    if lowest is not None:
        sentences.append(f"Specificity is lowest, {shown(lowest[0], '.0f')}, for {lowest[1]}.")
    return " ".join(sentences)


def _lowest(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, str] | None:
    """The lowest score after the edits, and the kinds of fact that have it."""
    values = column(rows, "after", name)
    if not known(values):
        return None
    low = min(known(values))
    names = [str(row.get("relation") or "no relation") for row, value in zip(rows, values, strict=True) if value == low]
    return low, _listed([*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])])


def _forgetting(data: Mapping[str, Any]) -> str:
    rows = rows_of(data, "edit_batches")
    name = next((name for name in reversed(METRICS) if known(column(rows, "at_the_end", name))), "")
    lost = {
        index: (once, end)
        for index, (once, end) in enumerate(
            zip(column(rows, "at_once", name), column(rows, "at_the_end", name), strict=True)
        )
        if not math.isnan(once - end)
    }
    if not lost or len(rows) < 2:
        return ""
    title = _NAMES.get(name, name)
    once, end = (_mean([pair[i] for pair in lost.values()]) for i in (0, 1))
    text = f"The mean {title} of the edit batches is {shown(once)} right after writing and {shown(end)} at the end"
    worst = max(lost, key=lambda index: lost[index][0] - lost[index][1])
    if lost[worst][0] - lost[worst][1] <= 0:
        return f"{text}: no edit batch has lost any."
    batch = rows[worst].get("edit_batch", worst)
    return f"{text}; edit batch {batch} lost most: {shown(lost[worst][0])} to {shown(lost[worst][1])}."


def _listed(parts: Sequence[str]) -> str:
    """Parts as a list in a sentence."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"

"""What a run shows in its loggers, as plain numbers and texts: pure functions of what an edit batch has left.

Legend: S = steps.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pmet_lightning.metrics import METRICS
from pmet_lightning.spread import LayerReport, SpreadReport
from pmet_lightning.tags import EDIT_BATCHES, HISTOGRAMS, NUMERICS, QUANTILES, STEPS, WRITES
from pmet_lightning.targets import PARTS, STOP_REASONS, Target, mean_curves, quantile_curves

LEVELS = {"q10": 0.1, "q50": 0.5, "q90": 0.9}
CLAMP_TOLERANCE = 1e-4  # relative: a delta this near its clamp touches it
_MOST_VECTORS = 256  # of an edit batch, in a histogram
_MOST_TEXTS = 8  # of an edit batch
_COLUMNS = ("question", "old answer", "target", "says before", "says after")


def step_points(targets: Sequence[Target]) -> Iterator[dict[str, float]]:
    """At each step, over the edits that took it: means and quantiles; and the share that is done behind it."""
    quantiles = quantile_curves(targets, list(LEVELS.values()))
    for point, levels_LP in zip(mean_curves(targets), quantiles, strict=True):
        done = sum(len(target.history_SP) <= point["step"] + 1 for target in targets)
        values = {f"{STEPS}/{part}": point[part] for part in PARTS}
        values[f"{STEPS}/finished"] = done / len(targets)
        for level, row in zip(LEVELS, levels_LP.tolist(), strict=True):
            values |= {f"{QUANTILES}/{part}_{level}": value for part, value in zip(PARTS, row, strict=True)}
        yield values


def batch_points(report: SpreadReport, clamp: float) -> dict[str, float]:
    """What the search for the targets of an edit batch has found, and what is left of the residual.

    Args:
        report: Of the edit batch.
        clamp: Longest delta, in norms of the clean output.
    """
    records, count = [target.record for target in report.targets], len(report.targets)
    reasons = Counter(record["stop_reason"] for record in records)
    values = {f"stopped_by_{reason}": reasons[reason] / count for reason in STOP_REASONS}
    for name in ("steps", "p_before", "p_after", *_deltas(report)):
        values[name] = sum(record[name] for record in records) / count
    for name in _deltas(report):
        touching = sum(record[name] >= clamp * (1 - CLAMP_TOLERANCE) for record in records)
        values[f"clamped_{name.removeprefix('delta_')}"] = touching / count
    values["residual_left"] = sum(report.residual_left) / count
    return {f"{EDIT_BATCHES}/{name}": value for name, value in values.items()}


def layer_points(layer: LayerReport) -> dict[str, float]:
    """One write: what it did, and how well it was solved and stored."""
    place = f"{layer.site}_layer_{layer.layer}"
    did = {
        "residual_after": layer.residual_after,
        "overshoot": layer.overshoot,
        "norm_ratio": layer.norm_ratio,
        "growth": layer.growth,
    }
    numerics = {
        "solve_error": layer.relative_error,
        "condition_bound": layer.condition_bound,
        "ridge": layer.ridge,
        "kept": layer.written.kept,
        "changed": layer.written.changed,
        "rounding": layer.written.rounding,
    }
    return {f"{WRITES}/{name}/{place}": value for name, value in did.items()} | {
        f"{NUMERICS}/{name}/{place}": value for name, value in numerics.items()
    }


def histograms(report: SpreadReport) -> dict[str, Tensor]:
    """Entries of the target vectors of some edits, and a number for every edit."""
    some = report.targets[:_MOST_VECTORS]
    found = {f"target_{site}": torch.stack([target.values[site] for target in some]).float() for site in some[0].values}
    for name in ("steps", "p_after", *_deltas(report)):
        found[name] = torch.tensor([float(target.record[name]) for target in report.targets])
    found["residual_left"] = torch.tensor(report.residual_left)
    return {f"{HISTOGRAMS}/{name}": values for name, values in found.items()}


def shown_edits(count: int) -> range:
    """Places of the edits of an edit batch that are shown as text."""
    return range(min(count, _MOST_TEXTS))


def answers_table(questions: Sequence[str], before: Sequence[str], ledger: Sequence[str]) -> str:
    """What the model says about some edits before and after their edit batch, in Markdown.

    Args:
        questions: What is asked.
        before: What it said.
        ledger: Lines of these edits.
    """
    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for question, said, text in zip(questions, before, ledger, strict=True):
        line = json.loads(text)
        rows.append((question, line["target_true"] or "", line["target"], said, line["answer"]))
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def is_shown(edit_batch: int) -> bool:
    """Whether curves, histograms and texts of an edit batch are kept: 0 to 9, 10, 20 to 90, 100, 200 and so on.

    A stream of thousands would otherwise leave gigabytes.
    """
    return edit_batch % 10 ** (len(str(edit_batch)) - 1) == 0


def layout(scores: str) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """Charts of TensorBoard's custom scalars: quantiles as bands, layers together."""

    def band(part: str) -> tuple[str, list[str]]:
        return "Margin", [f"{QUANTILES}/{part}_{level}" for level in ("q50", "q10", "q90")]

    return {
        "scores before and after": {"scores": ("Multiline", [f"{scores}/{name}" for name in METRICS])},
        "targets by step: median, 10 % and 90 % of the edits": {part: band(part) for part in ("loss", "p", "p_prompt")},
        "edit batches": {
            "why the search stopped": ("Multiline", [f"{EDIT_BATCHES}/stopped_by_.*"]),
            "length of the deltas, in norms of the clean output": ("Multiline", [f"{EDIT_BATCHES}/delta_.*"]),
        },
        "writes, all layers together": {
            name: ("Multiline", [f"{WRITES}/{name}/.*"])
            for name in ("residual_after", "overshoot", "norm_ratio", "growth")
        },
    }


def _deltas(report: SpreadReport) -> list[str]:
    return [f"delta_{site}" for site in report.targets[0].values]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

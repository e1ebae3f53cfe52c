"""Scores as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pmet_lightning.evaluation.scores import METRICS, TEXTS


def score_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A small table of the scores, with 95 % intervals: a row for each evaluation.

    The row "freely" below it shows how often the answer appears in the text that the model generates.
    """
    lines = [f"{'':8}" + "".join(f"{name:>24}" for name in METRICS)]
    for phase, table in results.items():
        for label, suffix in ((phase, ""), ("  freely", "_contains")):
            if suffix == "" or any(f"{name}{suffix}" in table for name in METRICS):
                cells = [score_cell(table, f"{name}{suffix}") for name in METRICS]
                lines.append(f"{label:8}" + "".join(f"{cell:>24}" for cell in cells))
    counts = {int(table["count"]) for table in results.values() if "count" in table}
    return "\n".join([*lines, f"records: {', '.join(map(str, sorted(counts)))}"])


def score_cell(table: Mapping[str, float], name: str) -> str:
    """A score with its interval, or a dash."""
    return f"{table[name]:.1f} [{table[f'{name}_low']:.1f}, {table[f'{name}_high']:.1f}]" if name in table else "-"


def other_lines(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lines of the other measures: on text unrelated to the edits, and on generated text about what was edited."""
    lines = []
    for name in ("perplexity", "kl", "specificity_kept", "specificity_kl", "specificity_top1", *TEXTS):
        values = [f"{phase} {table[name]:.4g}" for phase, table in results.items() if name in table]
        if values:
            lines.append(f"{name.replace('_', ' ')}: {', '.join(values)}")
    return lines


def forgetting_lines(batches: Sequence[Mapping[str, Any]]) -> list[str]:
    """Scores of each edit batch right after it was written and after all of them."""
    if not batches:
        return []
    lines = [f"{'batch':8}" + "".join(f"{name:>24}" for name in METRICS) + "   (at once, then at the end)"]
    for batch in batches:
        once, end = batch["at_once"], batch.get("at_the_end", {})
        cells = [", ".join(f"{table[n]:.1f}" for table in (once, end) if n in table) or "-" for n in METRICS]
        lines.append(f"{batch['edit_batch']:<8}" + "".join(f"{cell:>24}" for cell in cells))
    return lines

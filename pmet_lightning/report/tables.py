"""Scores as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pmet_lightning.evaluation.scores import METRICS

_TABLES = {"": "  forced", "_contains": "  freely"}  # rows below the headline
_OTHERS = {
    "perplexity": "perplexity of unrelated text",
    "specificity_kept": "answers about other subjects that are still the unedited model's, in % of their tokens",
    "fluency": "fluency of sampled texts (entropy of their word pairs and triples, times 100; higher is more varied)",
    "consistency": "consistency of sampled texts with texts about the new objects (cosine times 100)",
}


def score_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A small table of the scores, with 95 % intervals: a row for each evaluation.

    The row "freely" below it shows how often the answer appears in the text that the model generates. Where records
    have no old object, that is the headline, and the row "forced" below it shows the share of the answer's tokens.
    """
    lines = [f"{'':8}" + "".join(f"{name:>24}" for name in METRICS)]
    for phase, table in results.items():
        first = headline_suffix(table)
        for suffix in (first, "" if first else "_contains"):
            if suffix in ("", first) or any(f"{name}{suffix}" in table for name in METRICS):
                cells = [score_cell(table, f"{name}{suffix}") for name in METRICS]
                label = phase if suffix == first else _TABLES[suffix]
                lines.append(f"{label:8}" + "".join(f"{cell:>24}" for cell in cells))
    counts = {int(table["count"]) for table in results.values() if "count" in table}
    if any(map(headline_suffix, results.values())):
        lines.append("no old object to compare with: share of answers that say the new one; forced: of its tokens")
    elif any("efficacy_contains" in table for table in results.values()):
        lines.append("freely: share of the generated answers that have the new object in them")
    return "\n".join([*lines, f"records: {', '.join(map(str, sorted(counts)))}"])


def headline_suffix(table: Mapping[str, float]) -> str:
    """Suffix of the scores that come first: generated answers where any record has no old object.

    Without one, efficacy is the share of the answer's tokens that are right under teacher forcing, which is above zero
    for an answer that is wrong.
    """
    return "_contains" if table.get("old_objects", 100.0) < 100 and "efficacy_contains" in table else ""


def score_cell(table: Mapping[str, float], name: str) -> str:
    """A score with its interval, if it has one, or a dash."""
    if name not in table:
        return "-"
    interval = f" [{table[f'{name}_low']:.1f}, {table[f'{name}_high']:.1f}]" if f"{name}_low" in table else ""
    return f"{table[name]:.1f}{interval}"


def other_lines(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lines of other measures that say what they are; the rest are in scores.json and on the report's page."""
    lines = []
    for name, words in _OTHERS.items():
        values = [f"{phase} {table[name]:.4g}" for phase, table in results.items() if name in table]
        if values:
            lines.append(f"{words}: {', '.join(values)}")
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

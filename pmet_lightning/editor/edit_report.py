"""What one call of :meth:`~pmet_lightning.editor.editor.Editor.edit` did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pmet_lightning.evaluation.verdict import CAUSES, Damage, Outcome, Verdict, judge, verdict_lines
from pmet_lightning.report.tables import other_lines, score_table

if TYPE_CHECKING:
    import pandas as pd

_MOST_ROWS = 20  # in a notebook
_COLUMNS = ("question", "target", "answer", "why", "remedy")
_NOTHING = judge((), Damage("not measured"))


@dataclass(frozen=True)
class EditReport:
    """What one call of ``Editor.edit`` did; printed, it is the table of the command line.

    Attributes:
        scores: ``before`` and ``after``, as in ``scores.json``: percentages and their 95 % intervals. Empty if
            nothing was evaluated.
        edits: One record per edit, as in ``ledger.jsonl``: steps, stop reason, P(o*) before and after, remaining
            residual, what the model says now.
        layers: One record per write: residual before it, ‖ΔW‖ / ‖W‖, how much of ΔW the stored weight keeps.
        ended: Why a limit of the section ``drift`` ended the call early; empty otherwise.
        verdict: How many facts the model says by itself, why not the others, and whether it is damaged.
        outcomes: How each edit ended, in the order of ``edits``.
        answers: One record per edit, as in ``answers.jsonl``: all its questions with the answers before and after.
            Empty if nothing was evaluated.
    """

    scores: Mapping[str, Mapping[str, float]]
    edits: tuple[Mapping[str, Any], ...]
    layers: tuple[Mapping[str, Any], ...]
    ended: str = ""
    verdict: Verdict = _NOTHING
    outcomes: tuple[Outcome, ...] = ()
    answers: tuple[Mapping[str, Any], ...] = ()

    @property
    def failed(self) -> tuple[dict[str, Any], ...]:
        """The edits that the model does not say: what was asked, what it says, why, and what to try."""
        rows = zip(self.edits, self.outcomes, strict=True)
        return tuple(_row(edit, outcome) for edit, outcome in rows if not outcome.said)

    def to_frame(self) -> pd.DataFrame:
        """A row for each edit: its ledger line, whether it is ``said``, the last ``answer``, ``why`` and ``remedy``.

        Raises:
            ImportError: If pandas is not installed.
        """
        import pandas as pd

        rows = zip(self.edits, self.outcomes, strict=True)
        return pd.DataFrame([{**edit, "said": outcome.said, **_row(edit, outcome)} for edit, outcome in rows])

    def __str__(self) -> str:
        lines = [self._written]
        if self.scores:
            lines += [score_table(self.scores), *other_lines(self.scores)]
        return "\n".join([*lines, *verdict_lines(self.verdict), *([f"ended: {self.ended}"] if self.ended else [])])

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict, the edits that failed, and the scores."""
        from html import escape

        lines = [self._written, *verdict_lines(self.verdict), *([f"ended: {self.ended}"] if self.ended else [])]
        parts = [f"<p>{'<br>'.join(escape(line) for line in lines)}</p>"]
        failed = self.failed
        if failed:
            rows = ["".join(f"<td>{escape(str(row[name]))}</td>" for name in _COLUMNS) for row in failed[:_MOST_ROWS]]
            head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
            parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
            more = len(failed) - len(rows)
            parts += [f"<p>and {more} more in <code>report.failed</code></p>"] if more > 0 else []
        if self.scores:
            parts.append(f"<pre>{escape(score_table(self.scores))}</pre>")
        return "".join(parts)

    @property
    def _written(self) -> str:
        batches = len({line["edit_batch"] for line in self.layers})
        return f"{len(self.edits)} edits written in {batches} edit batch{'es' * (batches != 1)}"


def _row(edit: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    why, remedy = ("", "") if outcome.cause is None else CAUSES[outcome.cause]
    return {
        "case_id": edit["case_id"],
        "question": edit["prompt"].replace("{}", edit["subject"], 1),
        "target": edit["target"],
        "answer": outcome.answer,
        "cause": outcome.cause,
        "why": why,
        "remedy": remedy,
    }

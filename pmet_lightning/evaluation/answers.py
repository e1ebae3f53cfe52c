"""What the model answers to each question of an edit, before and after: plain lines for a file and for the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pmet_lightning.data.records import Edit, Probe
from pmet_lightning.evaluation.generation import says
from pmet_lightning.evaluation.probes import ProbeResult, RecordResult

AnswerLine = dict[str, Any]


def answer_line(edit: Edit, result: RecordResult) -> AnswerLine:
    """The questions of an edit with their answers at one evaluation.

    What was edited is answered by free generation. A question about a neighbor is answered by the likeliest token at
    each position of its answer, which the evaluation knows at no cost: the first is what greedy decoding would say,
    and generating text for COUNTERFACT's ten neighbors too makes an evaluation 40 % longer (docs/evaluation.md).

    Args:
        edit: The edit.
        result: What was measured of its questions, in their order.
    """
    asked = zip(edit.probes, result.probes, strict=True)
    questions = [
        {
            "kind": probe.kind,
            "prompt": probe.prompt,
            "expected": probe.answer,
            "answer": found.answer,
            "right": is_right(probe, found),
        }
        for probe, found in asked
    ]
    return {
        "case_id": edit.case_id,
        "question": edit.question,
        "target": edit.target,
        "old_object": has_old_object(edit),
        "questions": questions,
    }


def is_right(probe: Probe, found: ProbeResult) -> bool:
    """Whether the model says a right answer or, to a question that is not asked freely, has it as the argmax."""
    if found.contains is None:
        return bool(found.accuracy)
    return any(says(found.answer, form) for form in probe.answers)


def has_old_object(edit: Edit) -> bool:
    """Whether the edit prompt is scored against an old object."""
    return all(probe.rival is not None for probe in edit.probes if probe.kind == "efficacy")


def old_objects(lines: Collection[AnswerLine]) -> dict[str, float]:
    """Percentage of edits with an old object, as a score; empty without edits."""
    return {"old_objects": 100 * sum(line["old_object"] for line in lines) / len(lines)} if lines else {}


def edit_answer(line: AnswerLine | None) -> tuple[str, bool] | None:
    """Answer to the edit prompt, and whether it is right; ``None`` if it was not asked."""
    found = [question for question in (line or {}).get("questions", ()) if question["kind"] == "efficacy"]
    return (str(found[0]["answer"]), bool(found[0]["right"])) if found else None


def joined(phases: Mapping[str, AnswerLine | None]) -> AnswerLine:
    """One line with the answers of several evaluations of the same edit.

    Args:
        phases: Its line at each evaluation by name, such as ``before`` and ``after``; ``None`` where it was not asked.
    """
    known = {phase: line for phase, line in phases.items() if line is not None}
    first = next(iter(known.values()))
    questions = []
    for number, question in enumerate(first["questions"]):
        shown = {name: question[name] for name in ("kind", "prompt", "expected")}
        for phase, line in known.items():
            found = line["questions"][number]
            shown |= {phase: found["answer"], f"{phase}_right": found["right"]}
        questions.append(shown)
    return {**{name: first[name] for name in ("case_id", "question", "target")}, "questions": questions}

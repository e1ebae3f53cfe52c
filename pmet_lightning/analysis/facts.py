"""Facts to look at: read from any file of edits or known facts, asked as token rows, kept if the model says them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.data.encoder import LocationError, PromptEncoder
from pmet_lightning.data.fields import RecordError
from pmet_lightning.data.readers import read_records
from pmet_lightning.data.records import parse_record, parse_records, template_of
from pmet_lightning.data.token_rows import TokenRow, by_token_budget, pad_rows
from pmet_lightning.model.forward import label_logits

log = logging.getLogger(__name__)

TRUE, NEW = "true", "new"


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        case_id: The record's own number, or its position.
        prompt: Template with exactly one ``{}``.
        subject: What stands for the ``{}``.
        true: What is true, where the record says so.
        new: What an edit made of it, where the record says so.
    """

    case_id: str
    prompt: str
    subject: str
    true: str | None
    new: str | None


@dataclass(frozen=True)
class Question:
    """A fact as the model reads it.

    Attributes:
        fact: The fact.
        ids: Token ids of the bare prompt.
        subject: Places of all of the subject's tokens.
        answers: First token of each answer, ``true`` and ``new`` as far as the record has them.
    """

    fact: Fact
    ids: list[int]
    subject: range
    answers: dict[str, int]


def read_facts(path: str | Sequence[str], **selection: Any) -> list[Fact]:
    """Facts of files or hub data sets in any format of edits, or in that of ``known_facts``.

    Args:
        path: As for :func:`~pmet_lightning.data.readers.read_edits`.
        **selection: split, skip, limit and shuffle, likewise.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        RecordError: If the file is empty or broken, or a record taken from it is unusable.
    """
    facts = []
    for number, origin, record in read_records(path, **selection):
        facts += _facts_of(record, number, origin)
    return facts


def _facts_of(record: Any, number: int, origin: str) -> list[Fact]:
    if isinstance(record, Mapping) and "attribute" in record and "target_new" not in record:
        return [_known_fact(record, number, origin)]
    edits = parse_records(record, number, origin)
    return [Fact(edit.case_id, edit.prompt, edit.subject, edit.target_true, edit.target) for edit in edits]


def _known_fact(record: Mapping[str, Any], number: int, origin: str) -> Fact:
    """ROME's ``known_facts``; the template may lack words that the prompt has, so that the prompt counts."""
    case_id = str(record.get("known_id", number))
    prompt = record.get("prompt") or record.get("template")
    if not prompt:
        raise RecordError(
            f"{origin}: no field 'prompt'; found {', '.join(map(repr, record))}. Expected known_facts records "
            "(subject, attribute, prompt), since there is an 'attribute'"
        )
    # An edit with the true answer as its target has all that a known fact needs, and its checks.
    edit = parse_record({**record, "prompt": prompt, "target_new": record["attribute"]}, number, origin)
    return Fact(case_id, template_of(edit.prompt, edit.subject, origin), edit.subject, edit.target, None)


def ask(facts: Sequence[Fact], encoder: PromptEncoder) -> tuple[list[Question], Counter[str]]:
    """Token rows of some facts.

    Returns:
        The questions, and how many facts were left out for which reason.
    """
    questions, left_out = [], Counter[str]()
    for fact in facts:
        try:
            questions.append(_question(fact, encoder))
        except LocationError as error:
            log.debug("%s", error)
            left_out["subject or answer without a token of its own"] += 1
    return questions, left_out


def _question(fact: Fact, encoder: PromptEncoder) -> Question:
    bare = encoder.encode(fact.prompt, fact.subject)
    answers = {}
    for name, text in ((TRUE, fact.true), (NEW, fact.new)):
        if text is None:
            continue
        row = encoder.encode(fact.prompt, fact.subject, target=text)
        if row.ids[: len(row.ids) - len(row.labels) + 1] != bare.ids:
            raise LocationError(f"the first token of {text!r} is partly the prompt's")
        answers[name] = row.labels[0]
    return Question(fact, bare.ids, encoder.subject_tokens(fact.prompt, fact.subject), answers)


@torch.no_grad()
def next_token(model: nn.Module, questions: Sequence[Question], pad_id: int, tokens_per_batch: int) -> Tensor:
    """What the model says after each prompt.

    Args:
        model: The language model.
        questions: What is asked.
        pad_id: Padding token.
        tokens_per_batch: Most padded tokens in one forward pass.

    Returns:
        Its first choice, P of that, P(true) and P(new), shape [N, 4], float64; NaN where there is no such answer.
    """
    found = torch.full((len(questions), 4), torch.nan, dtype=torch.float64)
    device = next(model.parameters()).device
    for indices in by_token_budget([len(q.ids) for q in questions], tokens_per_batch):
        rows = pad_rows([TokenRow(questions[i].ids, labels=(0,)) for i in indices], pad_id).to(device)
        p_RV = label_logits(model, rows)[:, 0].float().softmax(-1).cpu()
        for i, p_V in zip(indices, p_RV, strict=True):
            best = int(p_V.argmax())
            answers = [questions[i].answers.get(name) for name in (TRUE, NEW)]
            said = [torch.nan if token is None else float(p_V[token]) for token in answers]
            found[i] = torch.tensor([float(best), float(p_V[best]), *said])
    return found


def with_own_answers(questions: Sequence[Question], said_N4: Tensor) -> list[Question]:
    """The questions; of those whose record has no true answer, what the unedited model says is taken for it.

    Args:
        questions: What was asked.
        said_N4: What the unedited model said, as of :func:`next_token`.
    """
    first = said_N4[:, 0].long().tolist()
    return [replace(q, answers={TRUE: first[i], **q.answers}) for i, q in enumerate(questions)]


def followed(question: Question, edited: bool) -> str:
    """The answer a model is expected to give: the true one; an edited model the new one, where there is one."""
    return NEW if edited and NEW in question.answers else TRUE


def is_said(questions: Sequence[Question], said_N4: Tensor, edited: bool, least: float) -> list[bool]:
    """Whether each answer that is followed is the model's first choice, with a probability of at least ``least``."""
    first, p = said_N4[:, 0].tolist(), said_N4[:, 1].tolist()
    return [first[i] == q.answers[followed(q, edited)] and p[i] >= least for i, q in enumerate(questions)]

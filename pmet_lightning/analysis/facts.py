"""Facts to analyze: read from a file of edits or known facts, encoded as token rows, kept if the model states them."""

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
from pmet_lightning.data.records import ZsreTarget, parse_record, parse_records, template_of
from pmet_lightning.data.token_rows import IGNORE, TokenRow, by_token_budget, pad_rows
from pmet_lightning.model.forward import label_logits, most_logit_rows

log = logging.getLogger(__name__)

TRUE, NEW = "true", "new"


@dataclass(frozen=True)
class KnownFact:
    """One fact, as its record states it.

    Attributes:
        case_id: The record's own number, or its position.
        prompt: Template with exactly one ``{}``.
        subject: What replaces the ``{}``.
        true: The true answer, if the record has one.
        new: The new answer of an edit, if the record has one.
        relation: The kind of fact, if the record says so.
    """

    case_id: str
    prompt: str
    subject: str
    true: str | None
    new: str | None
    relation: str | None = None


@dataclass(frozen=True)
class Question:
    """A fact as the model reads it.

    Attributes:
        fact: The fact.
        ids: Token ids of the bare prompt.
        subject: Positions of the subject's tokens.
        answers: First token of each answer that the record has, by its name: ``true`` and ``new``.
    """

    fact: KnownFact
    ids: list[int]
    subject: range
    answers: dict[str, int]


def read_facts(path: str | Sequence[str], *, zsre_target: ZsreTarget = "answers", **selection: Any) -> list[KnownFact]:
    """Read facts from files or hub data sets, in any format of edits or in that of ``known_facts``.

    Args:
        path: As for :func:`~pmet_lightning.data.readers.read_edits`.
        zsre_target: As for the same function.
        **selection: ``split``, ``skip``, ``limit`` and ``shuffle``, as for it too.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        RecordError: If the file is empty or malformed, or a selected record is invalid.
    """
    facts = []
    for number, origin, record in read_records(path, **selection):
        facts += facts_of(record, number, origin, zsre_target)
    return facts


def facts_of(record: Any, number: int, origin: str, zsre_target: ZsreTarget = "answers") -> list[KnownFact]:
    """The facts of one record; one of MQuAKE may hold several.

    Args:
        record: A record of any format of edits, or of ``known_facts``.
        number: Position in the file, from 0.
        origin: File and record, for messages.
        zsre_target: The new object of a zsRE record.

    Raises:
        RecordError: If the record is invalid.
    """
    if isinstance(record, Mapping) and "attribute" in record and "target_new" not in record:
        return [_parse_known_facts(record, number, origin)]
    edits = parse_records(record, number, origin, zsre_target)
    return [KnownFact(e.case_id, e.prompt, e.subject, e.target_true, e.target, e.relation) for e in edits]


def _parse_known_facts(record: Mapping[str, Any], number: int, origin: str) -> KnownFact:
    """A record of ROME's ``known_facts``; its template may lack words of the prompt, so the prompt is used."""
    case_id = str(record.get("known_id", number))
    prompt = record.get("prompt") or record.get("template")
    if not prompt:
        raise RecordError(
            f"{origin}: no field 'prompt'; found {', '.join(map(repr, record))}. Expected known_facts records "
            "(subject, attribute, prompt), since there is an 'attribute'"
        )
    # Read as an edit whose target is the true answer, a known fact gets the same checks.
    edit = parse_record({**record, "prompt": prompt, "target_new": record["attribute"]}, number, origin)
    return KnownFact(case_id, template_of(edit.prompt, edit.subject, origin), edit.subject, edit.target, None)


def ask(facts: Sequence[KnownFact], encoder: PromptEncoder) -> tuple[list[Question], Counter[str]]:
    """Encode facts as questions.

    Returns:
        The questions, and the number of facts left out, by reason.
    """
    questions, left_out = [], Counter[str]()
    for fact in facts:
        try:
            questions.append(_question(fact, encoder))
        except LocationError as error:
            log.debug("%s", error)
            left_out["subject or answer without a token of its own"] += 1
    return questions, left_out


def _question(fact: KnownFact, encoder: PromptEncoder) -> Question:
    bare = encoder.encode(fact.prompt, fact.subject)
    answers = {}
    for name, text in ((TRUE, fact.true), (NEW, fact.new)):
        if text is None:
            continue
        answers[name] = answer_row(fact, text, encoder).labels[0]
    return Question(fact, bare.ids, encoder.subject_tokens(fact.prompt, fact.subject), answers)


def answer_row(fact: KnownFact, answer: str, encoder: PromptEncoder) -> TokenRow:
    """The bare prompt of a fact, with an answer as the labels.

    Raises:
        LocationError: If subject or answer have no token of their own.
    """
    bare = encoder.encode(fact.prompt, fact.subject)
    row = encoder.encode(fact.prompt, fact.subject, target=answer)
    if row.ids[: len(row.ids) - len(row.labels) + 1] != bare.ids:
        raise LocationError(f"the first token of {answer!r} is partly the prompt's")
    return row


@torch.no_grad()
def answer_ranks(model: nn.Module, rows: Sequence[TokenRow], pad_id: int, tokens_per_batch: int) -> list[int]:
    """How far down the model's list of next tokens an answer lies, under teacher forcing.

    Args:
        model: The language model.
        rows: Prompts with their answers, as :func:`answer_row` makes them.
        pad_id: Padding token.
        tokens_per_batch: Maximum number of padded tokens in one forward pass.

    Returns:
        For each row, the largest rank of the answer's tokens: 1 if each is the most probable one after the prompt and
        the tokens before it, so that the model says the answer by itself.
    """
    ranks = [0] * len(rows)
    device = next(model.parameters()).device
    labels = max((len(row.labels) for row in rows), default=1)
    most = max(1, most_logit_rows(model) // labels)
    for indices in by_token_budget([len(row.ids) for row in rows], tokens_per_batch, most):
        batch = pad_rows([rows[i] for i in indices], pad_id).to(device)
        logits_RKV = label_logits(model, batch)
        own_RK1 = logits_RKV.gather(-1, batch.label_ids.clamp_min(0).unsqueeze(-1))
        rank_RK = 1 + (logits_RKV > own_RK1).sum(dim=-1)
        worst_R = rank_RK.masked_fill(batch.label_ids == IGNORE, 0).amax(dim=-1)
        for i, rank in zip(indices, worst_R.tolist(), strict=True):
            ranks[i] = rank
    return ranks


@torch.no_grad()
def next_token(model: nn.Module, questions: Sequence[Question], pad_id: int, tokens_per_batch: int) -> Tensor:
    """The model's prediction of the token after each prompt.

    Args:
        model: The language model.
        questions: The questions.
        pad_id: Padding token.
        tokens_per_batch: Maximum number of padded tokens in one forward pass.

    Returns:
        Its first choice, P of that, P(true) and P(new), shape [N, 4], float64; NaN if there is no such answer.
    """
    found = torch.full((len(questions), 4), torch.nan, dtype=torch.float64)
    device = next(model.parameters()).device
    lengths = [len(q.ids) for q in questions]
    for indices in by_token_budget(lengths, tokens_per_batch, most_logit_rows(model)):
        rows = pad_rows([TokenRow(questions[i].ids, labels=(0,)) for i in indices], pad_id).to(device)
        p_RV = label_logits(model, rows)[:, 0].float().softmax(-1).cpu()
        for i, p_V in zip(indices, p_RV, strict=True):
            best = int(p_V.argmax())
            answers = [questions[i].answers.get(name) for name in (TRUE, NEW)]
            p_answers = [torch.nan if token is None else float(p_V[token]) for token in answers]
            found[i] = torch.tensor([float(best), float(p_V[best]), *p_answers])
    return found


def with_own_answers(questions: Sequence[Question], said_N4: Tensor) -> list[Question]:
    """The questions, with the unedited model's own answer as the true one if the record has none.

    Args:
        questions: The questions.
        said_N4: Predictions of the unedited model, as returned by :func:`next_token`.
    """
    first = said_N4[:, 0].long().tolist()
    return [replace(q, answers={TRUE: first[i], **q.answers}) for i, q in enumerate(questions)]


def followed(question: Question, edited: bool) -> str:
    """The name of the tracked answer: the true one; for an edited model the new one, if there is one."""
    return NEW if edited and NEW in question.answers else TRUE


def is_said(questions: Sequence[Question], said_N4: Tensor, edited: bool, least: float) -> list[bool]:
    """Whether each tracked answer is the model's first choice, with a probability of at least ``least``."""
    first, p = said_N4[:, 0].tolist(), said_N4[:, 1].tolist()
    return [first[i] == q.answers[followed(q, edited)] and p[i] >= least for i, q in enumerate(questions)]

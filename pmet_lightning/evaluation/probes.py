"""Questions to a model and their scores: stateless functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.data.records import Probe, ProbeKind
from pmet_lightning.evaluation.answer_scores import RowScore, score_answers
from pmet_lightning.evaluation.generation import contains, is_exact
from pmet_lightning.evaluation.next_tokens import OVERLAPS, NextTokens, kl_from, overlap

FREE_KINDS: tuple[ProbeKind, ...] = ("efficacy", "generalisation", "portability", "multihop")


@dataclass(frozen=True)
class ProbeResult:
    """Score of one question.

    Attributes:
        kind: The metric it counts for.
        success: 1 or 0 where there is a rival, else the share of the answer's tokens that are the argmax; the best form
            of the answer counts.
        magnitude: e^-NLL(answer) - e^-NLL(rival), or e^-NLL(answer) without one.
        exact: 1 or 0: whether the first sentence that the model generates is the answer; ``None`` if not asked.
        contains: 1 or 0: whether the answer occurs in the text that the model generates.
        accuracy: 1 or 0: whether every token of a form of the answer is the argmax.
        tokens: The argmax at the position of every token of the answer.
        next_tokens: The distribution after the question, where it is compared with that of the unedited model.
        kept: Share of ``tokens`` that equal those of the unedited model; ``None`` if that was not asked.
        kl: KL divergence of the next token from the unedited model to this one, in nats.
        top1: Whether the likeliest next token is that of the unedited model.
        top5: Overlap of the five likeliest next tokens.
        top10: Overlap of the ten likeliest next tokens.
        answer: The text that the model generates; of a question that it was not asked freely, ``tokens`` as text.
    """

    kind: ProbeKind
    success: float
    magnitude: float
    exact: float | None = None
    contains: float | None = None
    accuracy: float = 0.0
    tokens: tuple[int, ...] = ()
    next_tokens: NextTokens | None = None
    kept: float | None = None
    kl: float | None = None
    top1: float | None = None
    top5: float | None = None
    top10: float | None = None
    answer: str = ""


@dataclass(frozen=True)
class RecordResult:
    """Everything measured for one record.

    Attributes:
        position: Its index among the edits, from 0.
        probes: One result for each of its questions.
        fluency: n-gram entropy of texts about its subject; ``None`` if none were made.
        consistency: Similarity of these texts to those about entities that have o*; NaN if there are no such texts.
    """

    position: int
    probes: tuple[ProbeResult, ...]
    fluency: float | None = None
    consistency: float | None = None


def compare_with_clean(after: Sequence[ProbeResult], before: Sequence[ProbeResult]) -> tuple[ProbeResult, ...]:
    """Results with what the edits have changed, from those of the unedited model.

    ``kept`` is KnowEdit's locality, where the questions are those about the neighbors.
    """
    return tuple(replace(a, **_changes(a, b)) for a, b in zip(after, before, strict=True))


def _changes(after: ProbeResult, before: ProbeResult) -> dict[str, Any]:
    kept = sum(map(int.__eq__, after.tokens, before.tokens)) / len(after.tokens)
    if after.next_tokens is None or before.next_tokens is None:
        return {"kept": kept}
    overlaps = {f"top{count}": overlap(before.next_tokens, after.next_tokens, count) for count in OVERLAPS}
    return {"kept": kept, "kl": kl_from(before.next_tokens, after.next_tokens), **overlaps}


def score_probes(
    model: nn.Module,
    encoder: PromptEncoder,
    probes: Sequence[Sequence[Probe]],
    tokens_per_batch: int,
    device: torch.device,
    free_tokens: int = 0,
    clean: Sequence[Sequence[ProbeResult] | None] | None = None,
) -> list[list[ProbeResult]]:
    """Score the questions of some records, teacher-forced and, for what was edited, in free generation.

    Args:
        model: The language model, edited or not.
        encoder: Makes the rows.
        probes: Questions of each record.
        tokens_per_batch: Maximum number of padded tokens in one forward pass.
        device: Device of the model.
        free_tokens: Maximum number of tokens of a generated answer; 0 generates none.
        clean: Results of the unedited model for each record, or ``None`` for a record of which there are none yet: the
            distributions after questions about neighbors are kept for the comparison. Without it, they are not.

    Returns:
        Results, nested as ``probes``.
    """
    flat = [probe for record in probes for probe in record]
    # Every form of every answer, then every rival, is a row of its own.
    forms = [(i, form) for i, probe in enumerate(flat) for form in probe.answers]
    rivals = [(i, probe.rival) for i, probe in enumerate(flat) if probe.rival is not None]
    asked = [i for i, probe in enumerate(flat) if free_tokens and probe.kind in FREE_KINDS]
    wanted = [*forms, *rivals, *((i, None) for i in asked)]
    rows = encoder.encode_all([flat[i].prompt for i, _ in wanted], [text for _, text in wanted])
    compared = {} if clean is None else _compared(forms, probes, clean)
    scores, generated = score_answers(model, rows, encoder.pad_id, tokens_per_batch, device, free_tokens, compared)
    of_forms: dict[int, list[RowScore]] = {}
    for row, (i, _) in enumerate(forms):
        of_forms.setdefault(i, []).append(scores[row])
    rival = {i: scores[row].nll for row, (i, _) in enumerate(rivals, start=len(forms))}
    scored = [_result(probe, of_forms[i], rival.get(i)) for i, probe in enumerate(flat)]
    scored = [replace(result, answer=encoder.decode(result.tokens)) for result in scored]
    for row, i in enumerate(asked, start=len(forms) + len(rivals)):
        text = encoder.decode(generated[row])
        exact = any(is_exact(text, answer) for answer in flat[i].answers)
        found = any(contains(text, answer) for answer in flat[i].answers)
        scored[i] = replace(scored[i], exact=float(exact), contains=float(found), answer=text)
    results = iter(scored)
    return [[next(results) for _ in record] for record in probes]


def _compared(
    forms: Sequence[tuple[int, str]],
    probes: Sequence[Sequence[Probe]],
    clean: Sequence[Sequence[ProbeResult] | None],
) -> dict[int, NextTokens | None]:
    """The rows of questions about neighbors, each with the distribution of the unedited model if that is known."""
    flat = [
        (probe.kind, None if results is None else results[i].next_tokens)
        for record, results in zip(probes, clean, strict=True)
        for i, probe in enumerate(record)
    ]
    first_rows: dict[int, int] = {}
    for row, (i, _) in enumerate(forms):
        first_rows.setdefault(i, row)
    return {first_rows[i]: reference for i, (kind, reference) in enumerate(flat) if kind == "specificity"}


def _result(probe: Probe, forms: Sequence[RowScore], rival_nll: float | None) -> ProbeResult:
    """The best form counts, separately for each measure."""
    nll, accuracy = min(form.nll for form in forms), max(form.accuracy for form in forms)
    success = accuracy if rival_nll is None else float(nll < rival_nll)
    magnitude = math.exp(-nll) - (0.0 if rival_nll is None else math.exp(-rival_nll))
    exact = float(accuracy == 1)
    return ProbeResult(
        probe.kind, success, magnitude, accuracy=exact, tokens=forms[0].tokens, next_tokens=forms[0].next_tokens
    )


def harmonic_mean(values: Tensor) -> Tensor:
    """Harmonic mean over the last dimension; 0 where any value is 0 or less."""
    positive = (values > 0).all(dim=-1)
    mean = values.shape[-1] / values.clamp_min(1e-300).reciprocal().sum(dim=-1)
    return torch.where(positive, mean, torch.zeros_like(mean))

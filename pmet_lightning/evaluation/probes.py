"""Questions to a model and their scores: stateless functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.data.records import Probe, ProbeKind
from pmet_lightning.evaluation.answer_scores import RowScore, score_answers
from pmet_lightning.evaluation.generation import contains, is_exact

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
        kept: Share of ``tokens`` that equal those of the unedited model; ``None`` if that was not asked.
    """

    kind: ProbeKind
    success: float
    magnitude: float
    exact: float | None = None
    contains: float | None = None
    accuracy: float = 0.0
    tokens: tuple[int, ...] = ()
    kept: float | None = None


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
    """Results with ``kept``, from those of the unedited model (KnowEdit's locality is that of the neighbors)."""
    pairs = zip(after, before, strict=True)
    return tuple(replace(a, kept=sum(map(int.__eq__, a.tokens, b.tokens)) / len(a.tokens)) for a, b in pairs)


def score_probes(
    model: nn.Module,
    encoder: PromptEncoder,
    probes: Sequence[Sequence[Probe]],
    tokens_per_batch: int,
    device: torch.device,
    free_tokens: int = 0,
) -> list[list[ProbeResult]]:
    """Score the questions of some records, teacher-forced and, for what was edited, in free generation.

    Args:
        model: The language model, edited or not.
        encoder: Makes the rows.
        probes: Questions of each record.
        tokens_per_batch: Maximum number of padded tokens in one forward pass.
        device: Device of the model.
        free_tokens: Maximum number of tokens of a generated answer; 0 generates none.

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
    scores, generated = score_answers(model, rows, encoder.pad_id, tokens_per_batch, device, free_tokens)
    of_forms: dict[int, list[RowScore]] = {}
    for row, (i, _) in enumerate(forms):
        of_forms.setdefault(i, []).append(scores[row])
    rival = {i: scores[row].nll for row, (i, _) in enumerate(rivals, start=len(forms))}
    scored = [_result(probe, of_forms[i], rival.get(i)) for i, probe in enumerate(flat)]
    for row, i in enumerate(asked, start=len(forms) + len(rivals)):
        text = encoder.decode(generated[row])
        exact = any(is_exact(text, answer) for answer in flat[i].answers)
        found = any(contains(text, answer) for answer in flat[i].answers)
        scored[i] = replace(scored[i], exact=float(exact), contains=float(found))
    results = iter(scored)
    return [[next(results) for _ in record] for record in probes]


def _result(probe: Probe, forms: Sequence[RowScore], rival_nll: float | None) -> ProbeResult:
    """The best form counts, separately for each measure."""
    nll, accuracy = min(form.nll for form in forms), max(form.accuracy for form in forms)
    success = accuracy if rival_nll is None else float(nll < rival_nll)
    magnitude = math.exp(-nll) - (0.0 if rival_nll is None else math.exp(-rival_nll))
    return ProbeResult(probe.kind, success, magnitude, accuracy=float(accuracy == 1), tokens=forms[0].tokens)


def harmonic_mean(values: Tensor) -> Tensor:
    """Harmonic mean over the last dimension; 0 where any value is 0 or less."""
    positive = (values > 0).all(dim=-1)
    mean = values.shape[-1] / values.clamp_min(1e-300).reciprocal().sum(dim=-1)
    return torch.where(positive, mean, torch.zeros_like(mean))

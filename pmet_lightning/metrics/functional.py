"""Questions to a model and their scores: functions without state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pmet_lightning.edits.records import Probe, ProbeKind
from pmet_lightning.language_model import label_logits
from pmet_lightning.metrics.generation import contains, greedy_texts, is_exact
from pmet_lightning.objective import target_scores
from pmet_lightning.tokens import PromptEncoder, TokenRow, by_token_budget, pad_rows

FREE_KINDS: tuple[ProbeKind, ...] = ("efficacy", "generalisation", "portability", "multihop")


@dataclass(frozen=True)
class ProbeResult:
    """Score of one question.

    Attributes:
        kind: The metric it counts for.
        success: 1 or 0 where there is a rival, else the share of the answer's tokens that are the argmax; the best form
            of an answer counts.
        magnitude: e^-NLL(answer) - e^-NLL(rival), or e^-NLL(answer) without one.
        exact: 1 or 0: whether the first sentence of what the model says freely is the answer; ``None`` if not asked.
        contains: 1 or 0: whether the answer stands in what the model says freely.
    """

    kind: ProbeKind
    success: float
    magnitude: float
    exact: float | None = None
    contains: float | None = None


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
        tokens_per_batch: Most padded tokens in one forward pass.
        device: Where the model is.
        free_tokens: Most tokens of a free answer; 0 asks for none.

    Returns:
        Results in the shape of ``probes``.
    """
    flat = [probe for record in probes for probe in record]
    # Every form of every answer, then every rival, is a row of its own.
    forms = [(i, form) for i, probe in enumerate(flat) for form in probe.answers]
    rivals = [(i, probe.rival) for i, probe in enumerate(flat) if probe.rival is not None]
    rows = [encoder.encode(flat[i].prompt, target=text) for i, text in (*forms, *rivals)]
    nll, accuracy = _score_rows(model, rows, encoder.pad_id, tokens_per_batch, device)
    best: dict[int, tuple[float, float]] = {}
    for (i, _), form_nll, form_accuracy in zip(forms, nll.tolist(), accuracy.tolist(), strict=False):
        known_nll, known_accuracy = best.get(i, (float("inf"), 0.0))
        best[i] = min(known_nll, form_nll), max(known_accuracy, form_accuracy)
    rival_nll = dict(zip((i for i, _ in rivals), nll[len(forms) :].tolist(), strict=True))
    scored = [_result(probe, best[i][0], rival_nll.get(i), best[i][1]) for i, probe in enumerate(flat)]
    asked = [i for i, probe in enumerate(flat) if free_tokens and probe.kind in FREE_KINDS]
    texts = greedy_texts(
        model,
        encoder,
        [flat[i].prompt for i in asked],
        tokens_per_batch=tokens_per_batch,
        device=device,
        new_tokens=free_tokens,
    )
    for i, text in zip(asked, texts, strict=True):
        exact = any(is_exact(text, answer) for answer in flat[i].answers)
        found = any(contains(text, answer) for answer in flat[i].answers)
        scored[i] = replace(scored[i], exact=float(exact), contains=float(found))
    results = iter(scored)
    return [[next(results) for _ in record] for record in probes]


def _result(probe: Probe, nll: float, rival_nll: float | None, accuracy: float) -> ProbeResult:
    p = torch.tensor(-nll).exp().item()
    if rival_nll is None:
        return ProbeResult(probe.kind, accuracy, p)
    return ProbeResult(probe.kind, float(nll < rival_nll), p - torch.tensor(-rival_nll).exp().item())


@torch.no_grad()
def _score_rows(
    model: nn.Module, rows: Sequence[TokenRow], pad_id: int, budget: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """NLL and token accuracy of each row's labels, float64 on the CPU, shape [R] each."""
    nll, accuracy = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.float64)
    for indices in by_token_budget([len(row.ids) for row in rows], budget):
        batch = pad_rows([rows[i] for i in indices], pad_id).to(device)
        scores = target_scores(label_logits(model, batch), batch.label_ids)
        nll[indices] = scores.nll.double().cpu()
        accuracy[indices] = scores.token_accuracy.double().cpu()
    return nll, accuracy


def harmonic_mean(values: Tensor) -> Tensor:
    """Harmonic mean over the last dimension; 0 where any value is 0 or less."""
    positive = (values > 0).all(dim=-1)
    mean = values.shape[-1] / values.clamp_min(1e-300).reciprocal().sum(dim=-1)
    return torch.where(positive, mean, torch.zeros_like(mean))

"""Questions to a model and their scores: functions without state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pmet_lightning.edits.records import Probe, ProbeKind
from pmet_lightning.language_model import label_logits
from pmet_lightning.objective import target_scores
from pmet_lightning.tokens import PromptEncoder, TokenRow, by_token_budget, pad_rows


@dataclass(frozen=True)
class ProbeResult:
    """Score of one question.

    Attributes:
        kind: The metric it counts for.
        success: 1 or 0 where there is a rival, else the share of the answer's tokens that are the argmax.
        magnitude: e^-NLL(answer) - e^-NLL(rival), or e^-NLL(answer) without one.
    """

    kind: ProbeKind
    success: float
    magnitude: float


def score_probes(
    model: nn.Module,
    encoder: PromptEncoder,
    probes: Sequence[Sequence[Probe]],
    tokens_per_batch: int,
    device: torch.device,
) -> list[list[ProbeResult]]:
    """Score the questions of some records, teacher-forced.

    Args:
        model: The language model, edited or not.
        encoder: Makes the rows.
        probes: Questions of each record.
        tokens_per_batch: Most padded tokens in one forward pass.
        device: Where the model is.

    Returns:
        Results in the shape of ``probes``.
    """
    flat = [probe for record in probes for probe in record]
    rows = [encoder.encode(probe.prompt, target=probe.answer) for probe in flat]
    rivals = [(i, probe.rival) for i, probe in enumerate(flat) if probe.rival is not None]
    rows += [encoder.encode(flat[i].prompt, target=rival) for i, rival in rivals]
    nll, accuracy = _score_rows(model, rows, encoder.pad_id, tokens_per_batch, device)
    rival_nll = dict(zip((i for i, _ in rivals), nll[len(flat) :].tolist(), strict=True))
    results = iter(_result(probe, float(nll[i]), rival_nll.get(i), float(accuracy[i])) for i, probe in enumerate(flat))
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

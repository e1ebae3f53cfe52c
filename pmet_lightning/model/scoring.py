"""How well a target is predicted, and the KL divergence (docs/method.md, 'Targets'): pure functions.

Legend: N = some tokens, K = target tokens, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pmet_lightning.data.token_rows import IGNORE


@dataclass(frozen=True)
class TargetScores:
    """How well the target is predicted.

    Attributes:
        nll: Mean over target tokens of -log p.
        all_argmax: Whether every target token is the most probable one.
        token_accuracy: Share of target tokens that are the most probable one.
        argmax: The most probable tokens, int64, shape [..., K].
    """

    nll: Tensor
    all_argmax: Tensor
    token_accuracy: Tensor
    argmax: Tensor


def target_scores(logits_NV: Tensor, label_ids_K: Tensor, at_K: Tensor | None = None) -> TargetScores:
    """Score labels under teacher forcing.

    Args:
        logits_NV: Shape [N, V] or, without ``at_K``, [..., K, V]; any float dtype, computed in float32 at least.
        label_ids_K: int64, shape [..., K], ``IGNORE`` after the end of a shorter target.
        at_K: int64, shape [..., K], index of the logits that predict each label.

    Returns:
        Scores of shape [...], except for ``argmax``.
    """
    logits = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).flatten(0, -2)
    if at_K is None:
        at_K = torch.arange(len(logits), device=logits.device).view(label_ids_K.shape)
    real = label_ids_K != IGNORE
    labels = label_ids_K.clamp_min(0)
    log_p = logits[at_K, labels] - logits.logsumexp(dim=-1)[at_K]
    count = real.sum(dim=-1)
    argmax = logits.argmax(dim=-1)[at_K]
    hit = (argmax == labels) & real
    return TargetScores(
        nll=-(log_p * real).sum(dim=-1) / count,
        all_argmax=(hit | ~real).all(dim=-1),
        token_accuracy=hit.sum(dim=-1) / count,
        argmax=argmax,
    )


def kl_divergence(log_p_V: Tensor, log_q_V: Tensor) -> Tensor:
    """Σ p · (log p − log q) over the vocabulary; p is the model with the deltas, q the clean one.

    For the prompt and the direction see docs/method.md, choice 4.

    Args:
        log_p_V: Log-probabilities that weigh the sum, shape [..., V].
        log_q_V: Log-probabilities compared with them, shape [..., V].

    Returns:
        Shape [...].
    """
    return (log_p_V.exp() * (log_p_V - log_q_V)).sum(dim=-1)

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


def label_scores(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """log p of a label for each token, and the most probable tokens, int64; shape [N] each.

    Args:
        logits_NV: Logits of any float dtype; computed in float32 at least.
        labels_N: int64; ``IGNORE`` gives any number.
    """
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    log_p_N = logits_NV.gather(1, labels_N.clamp_min(0).unsqueeze(1)).squeeze(1) - logits_NV.logsumexp(dim=-1)
    return log_p_N, logits_NV.argmax(dim=-1)


def target_scores(logits_KV: Tensor, label_ids_K: Tensor) -> TargetScores:
    """Score labels under teacher forcing.

    Args:
        logits_KV: Shape [..., K, V], any float dtype, computed in float32 at least.
        label_ids_K: int64, shape [..., K], ``IGNORE`` after the end of a shorter target.

    Returns:
        Scores of shape [...], except for ``argmax``.
    """
    found = label_scores(logits_KV.flatten(0, -2), label_ids_K.flatten())
    log_p_K, argmax_K = (values_N.view(label_ids_K.shape) for values_N in found)
    return scores_of_targets(log_p_K, argmax_K, label_ids_K)


def scores_of_targets(log_p_K: Tensor, argmax_K: Tensor, label_ids_K: Tensor) -> TargetScores:
    """Scores of targets from those of their tokens, as :func:`label_scores` gives them, shape [..., K] each."""
    real = label_ids_K != IGNORE
    count = real.sum(dim=-1)
    hit = (argmax_K == label_ids_K) & real
    return TargetScores(
        nll=-(log_p_K * real).sum(dim=-1) / count,
        all_argmax=(hit | ~real).all(dim=-1),
        token_accuracy=hit.sum(dim=-1) / count,
        argmax=argmax_K,
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

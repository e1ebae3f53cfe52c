"""What follows a prompt, before and after an edit: the change that needs no gold answer (docs/evaluation.md).

Legend: V = vocabulary, K = kept tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pmet_lightning.model.scoring import kl_divergence

KEPT = 256  # tokens whose probabilities are kept for each prompt: 3 KB
OVERLAPS = (1, 5, 10)


@dataclass(frozen=True, eq=False)
class NextTokens:
    """A model's distribution of the next token, as far as it is kept.

    Attributes:
        ids_K: The likeliest tokens of the model that is compared with, likeliest first; int64, shape [K].
        log_p_K: Their log-probabilities, float32, shape [K].
        top: This model's own likeliest tokens, likeliest first.
    """

    ids_K: Tensor
    log_p_K: Tensor
    top: tuple[int, ...]

    @classmethod
    def of(cls, logits_V: Tensor, reference: NextTokens | None = None) -> NextTokens:
        """Keep of a distribution what can be compared.

        Args:
            logits_V: Logits after the prompt, shape [V].
            reference: The distribution that it will be compared with; ``None`` for the one of the clean model.
        """
        log_p_V = logits_V.float().log_softmax(-1)
        most = min(KEPT if reference is None else max(OVERLAPS), len(log_p_V))
        top = log_p_V.topk(most).indices
        ids = top if reference is None else reference.ids_K.to(log_p_V.device)
        return cls(ids.cpu(), log_p_V[ids].cpu(), tuple(top[: max(OVERLAPS)].tolist()))


def kl_from(clean: NextTokens, edited: NextTokens) -> float:
    """KL(clean ‖ edited) in nats over the clean model's likeliest tokens, all others counted as one.

    Grouping can only lower a KL divergence, so this is a lower bound of that over the vocabulary.
    """
    log_p, log_q = (_with_rest(tokens.log_p_K) for tokens in (clean, edited))
    return float(kl_divergence(log_p, log_q).clamp_min(0))


def overlap(clean: NextTokens, edited: NextTokens, count: int) -> float:
    """Share of the clean model's ``count`` likeliest tokens that are among the edited one's."""
    return len(set(clean.top[:count]) & set(edited.top[:count])) / min(count, len(clean.top))


def _with_rest(log_p_K: Tensor) -> Tensor:
    """The log-probabilities in float64, and that of all other tokens together."""
    log_p = log_p_K.double()
    rest = (1 - log_p.exp().sum()).clamp_min(1e-12).log()
    return torch.cat([log_p, rest.reshape(1)])

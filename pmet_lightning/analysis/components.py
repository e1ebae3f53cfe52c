"""What attention and FFN do in each layer: similarity of input and output, logit lens, contribution to an answer.

Legend: N = facts, L = layers, K = selected tokens (the subject's last, the prompt's last), F = model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pmet_lightning.analysis.facts import NEW, TRUE, Question
from pmet_lightning.analysis.lens import Lens
from pmet_lightning.analysis.measures import Measure
from pmet_lightning.analysis.streams import Streams, streams_of
from pmet_lightning.data.token_rows import TokenRow, pad_rows
from pmet_lightning.model.projections import Sites

SUBJECT, LAST = "subject", "last"
TOKENS = (SUBJECT, LAST)
ATTN, FFN = "attn", "ffn"
COMPONENTS = (ATTN, FFN)
ANSWERS = (TRUE, NEW)


def component_measures(
    model: nn.Module, sites: Sites, lens: Lens, questions: Sequence[Question], parallel: bool, pad_id: int, top: int
) -> dict[str, Measure]:
    """Measure some facts in one forward pass.

    Args:
        model: The language model.
        sites: Its modules.
        lens: Its lens.
        questions: The facts.
        parallel: Whether its blocks are parallel.
        pad_id: Padding token.
        top: Number of highest logits in the vocabulary projections that are compared.

    Returns:
        ``cosine`` and ``overlap`` of each component's input and output, ``lens`` (P of each answer) and
        ``contribution`` (to the logit of each answer).
    """
    rows = pad_rows([TokenRow(q.ids, q.subject[-1]) for q in questions], pad_id).to(lens.device)
    ends = rows.attention_mask.sum(dim=1) - 1
    streams = streams_of(model, sites, rows, torch.stack([rows.subject, ends], dim=1), parallel)
    layers = list(range(len(sites.layers)))
    axes = {"token": TOKENS, "layer": layers}
    pairs = ((streams.entering, streams.attn), (streams.ffn_input, streams.ffn))
    cosines = torch.stack([cosine(*pair) for pair in pairs], dim=-1)
    overlaps = torch.stack([_overlap(lens, *pair, top) for pair in pairs], dim=-1)
    answers = {name: _answer(lens, questions, streams, name) for name in ANSWERS}
    probability, contribution = (torch.stack([answers[name][i] for name in ANSWERS], dim=-1) for i in (0, 1))
    return {
        "cosine": Measure(_facts_first(cosines), axes | {"component": COMPONENTS}),
        "overlap": Measure(_facts_first(overlaps), axes | {"component": COMPONENTS}),
        "lens": Measure(_facts_first(probability), axes | {"answer": ANSWERS}),
        "contribution": Measure(_facts_first(contribution), axes | {"component": COMPONENTS, "answer": ANSWERS}),
    }


def _facts_first(values_LNK: Tensor) -> Tensor:
    """From [L, N, K, ...] to [N, K, L, ...], on the CPU."""
    return values_LNK.permute(1, 2, 0, *range(3, values_LNK.dim())).float().cpu()


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine similarity along the last dimension, in float32."""
    return nn.functional.cosine_similarity(one.float(), other.float(), dim=-1)


def jaccard(one_NT: Tensor, other_NT: Tensor) -> Tensor:
    """Size of the intersection over that of the union, for sets of T different ids each; shape [N]."""
    shared = (one_NT.unsqueeze(2) == other_NT.unsqueeze(1)).sum(dim=(1, 2)).float()
    return shared / (one_NT.shape[1] + other_NT.shape[1] - shared)


def _overlap(lens: Lens, one_LNKF: Tensor, other_LNKF: Tensor, top: int) -> Tensor:
    """Jaccard overlap of the vocabulary projections of pairs of vectors, shape [L, N, K]."""
    ids = [lens.top(vectors.flatten(0, 2), min(top, lens.vocabulary)) for vectors in (one_LNKF, other_LNKF)]
    return jaccard(*ids).reshape(one_LNKF.shape[:3])


def _answer(lens: Lens, questions: Sequence[Question], streams: Streams, name: str) -> tuple[Tensor, Tensor]:
    """P of an answer under the lens, [L, N, K], and contributions to its logit, [L, N, K, components], or NaN."""
    depth, count, selected, _ = streams.leaving.shape
    has = torch.tensor([name in q.answers for q in questions])
    tokens_N = torch.tensor([q.answers.get(name, 0) for q in questions], device=streams.leaving.device)
    tokens_NK = tokens_N.unsqueeze(1).expand(count, selected)
    repeated_tokens = tokens_NK.expand(depth, count, selected).flatten()
    p = lens.probability(streams.leaving.flatten(0, 2), repeated_tokens).view(depth, count, selected)
    parts = torch.cat([streams.attn, streams.ffn]).flatten(1, 2)
    added = lens.contribution(parts, streams.leaving[-1].flatten(0, 1), tokens_NK.flatten())
    both = added.view(2, depth, count, selected).movedim(0, -1)
    missing = torch.tensor(torch.nan)
    return torch.where(has.view(1, -1, 1), p, missing), torch.where(has.view(1, -1, 1, 1), both, missing)

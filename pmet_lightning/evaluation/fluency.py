"""COUNTERFACT's generated texts: sampled from the model, and their fluency (GE).

Legend: R = texts of a batch, S = sampled tokens of a text, K = candidates of a token.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.data.token_rows import TokenRow, pad_rows
from pmet_lightning.model.generation_config import own_generation_config

LENGTH = 100  # tokens of a text, prompt included
_WORDS = re.compile(r"\w+|[^\w\s]")


def ngram_entropy(text: str, n: int) -> float:
    """Entropy in bits of a text's word n-grams, H_n = -sum f log2 f; 0 where it has fewer than n words.

    A word is a run of letters, digits and underscores; every other character except white space is a word of its own.

    Args:
        text: Any text.
        n: Words of an n-gram.
    """
    words = _WORDS.findall(text)
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = counts.total()
    return math.fsum(count / total * math.log2(total / count) for count in counts.values())


def fluency(texts: Sequence[str]) -> float:
    """Mean over texts of 1/2 (2/3 H_2 + 4/3 H_3), GE before it is multiplied by 100; NaN for no texts."""
    if not texts:
        return math.nan
    values = [(2 / 3 * ngram_entropy(text, 2) + 4 / 3 * ngram_entropy(text, 3)) / 2 for text in texts]
    return math.fsum(values) / len(values)


@torch.no_grad()
def sample_texts(
    model: nn.Module,
    encoder: PromptEncoder,
    prompts: Sequence[str],
    *,
    length: int = LENGTH,
    top_k: int = 5,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    tokens_per_batch: int,
    device: torch.device,
) -> list[str]:
    """Each prompt with a sampled continuation, which does not depend on what else is in the batch.

    The end-of-text token does not end a text (which would otherwise lose n-grams with its length); it is left out of
    the text, as every special token is. A prompt of ``length`` tokens or more is returned unchanged.

    Args:
        model: The language model.
        encoder: Makes the rows.
        prompts: Complete texts; equal ones are sampled independently.
        length: Tokens of a text, including the prompt's but not those of a chat template; fewer where the model has no
            positions for so many.
        top_k: Number of most probable tokens that each token is sampled from.
        seed: Two calls with one seed give the same texts; the global generators are not touched.
        groups: Record of each prompt: equal prompts are counted within it, so that other records change nothing. Where
            ``None``, all prompts belong to one.
        tokens_per_batch: Maximum number of padded tokens in one batch, including the new ones.
        device: Device of the model.
    """
    rows = [encoder.encode(prompt) for prompt in prompts]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
    limit = math.inf if positions is None else positions
    # A chat template's tokens do not count: they are no part of the text, whose entropy grows with its length.
    plain = rows if encoder.chat is None else [replace(encoder, chat=None).encode(prompt) for prompt in prompts]
    room = [min(length - len(p.ids), limit - len(row.ids)) for p, row in zip(plain, rows, strict=True)]
    steps = [int(max(0, tokens)) for tokens in room]
    noise = noise_tables(prompts, steps, top_k, seed, groups)
    texts = list(prompts)
    for indices in _batches(rows, steps, tokens_per_batch, limit):
        noise_RSK = nn.utils.rnn.pad_sequence([noise[i] for i in indices], batch_first=True).to(device)
        output = _generate(model, [rows[i] for i in indices], encoder.pad_id, noise_RSK)
        for i, ids in zip(indices, output, strict=True):
            texts[i] += continuation(encoder, rows[i].ids, ids[: steps[i]])
    return texts


def noise_tables(
    prompts: Sequence[str], steps: Sequence[int], top_k: int, seed: int, groups: Sequence[Hashable] | None
) -> list[Tensor]:
    """Gumbel noise of each prompt's tokens, float32 on the CPU, shape [S, K], seeded by the prompt and its count."""
    seen: Counter[tuple[Hashable, str]] = Counter()
    tables = []
    for group, prompt, tokens in zip(groups or [None] * len(prompts), prompts, steps, strict=True):
        name = json.dumps([seed, prompt, seen[group, prompt]])
        seen[group, prompt] += 1
        # Python's own hash differs between processes.
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        uniform = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        tables.append((-(-uniform.log()).log()).float())
    return tables


def _batches(rows: Sequence[TokenRow], steps: Sequence[int], budget: int, limit: float) -> list[list[int]]:
    """Rows to be continued, in batches of similar length.

    All rows of a batch are continued by as many tokens as the one that needs most, even the longest row, and must stay
    within the padded ``budget`` and the model's positions.
    """
    batches: list[list[int]] = []
    for i in sorted((i for i, tokens in enumerate(steps) if tokens), key=lambda i: -len(rows[i].ids)):
        batch = [*batches[-1], i] if batches else [i]
        width = len(rows[batch[0]].ids) + max(steps[j] for j in batch)
        if len(batch) > 1 and width <= limit and len(batch) * width <= budget:
            batches[-1] = batch
        else:
            batches.append([i])
    return batches


def _generate(model: nn.Module, rows: Sequence[TokenRow], pad_id: int, noise_RSK: Tensor) -> list[list[int]]:
    """The S token ids that follow each row."""
    from transformers import LogitsProcessorList

    batch = pad_rows(rows, pad_id, "left").to(noise_RSK.device)
    width = batch.input_ids.shape[1]
    # An end-of-text token ends nothing here.
    with own_generation_config(model, stop_at_end=False):
        output = model.generate(  # type: ignore[operator]
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            logits_processor=LogitsProcessorList([TopKGumbel(noise_RSK, width)]),
            max_new_tokens=noise_RSK.shape[1],
            do_sample=False,
            use_cache=True,
            pad_token_id=pad_id,
        )
    return output[:, width:].tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TopKGumbel:
    """Makes greedy decoding sample: the argmax of logits + Gumbel noise is a sample of the logits' softmax.

    Attributes:
        noise_RSK: Noise of the most probable token, the second and so on, shape [R, S, K].
        width: Padded tokens of the prompts.
    """

    noise_RSK: Tensor
    width: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores whose argmax is the sampled token, shape [R, V]."""
        noise_RK = self.noise_RSK[:, input_ids.shape[1] - self.width]
        top = scores.topk(noise_RK.shape[1], dim=-1)
        return torch.full_like(scores, -math.inf).scatter(1, top.indices, top.values + noise_RK)


def continuation(encoder: PromptEncoder, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """Text of the ids after a prompt: some tokenizers drop a leading space when they decode ids on their own."""
    head, whole = encoder.decode(prompt_ids), encoder.decode([*prompt_ids, *ids])
    text = whole[len(head) :] if whole.startswith(head) else encoder.decode(ids)
    return text if encoder.chat is None else " " + text.lstrip()

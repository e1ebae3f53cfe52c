"""What a model says when nobody holds its hand: greedy texts, and whether an answer is in them."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import torch
from torch import nn

from pmet_lightning.tokens import PromptEncoder, by_token_budget, pad_rows

NEW_TOKENS = 16
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_END_OF_SENTENCE = re.compile(r"\n|(?<=[.!?])(?:\s|$)")


@torch.no_grad()
def greedy_texts(
    model: nn.Module,
    encoder: PromptEncoder,
    prompts: Sequence[str],
    *,
    tokens_per_batch: int,
    device: torch.device,
    new_tokens: int = NEW_TOKENS,
) -> list[str]:
    """What the model says next, greedily, after each prompt.

    Args:
        model: The language model.
        encoder: Makes the rows.
        prompts: Finished texts.
        tokens_per_batch: Most padded tokens in one batch, the new ones included.
        device: Where the model is.
        new_tokens: Most tokens to say.
    """
    rows = [encoder.encode(prompt) for prompt in prompts]
    texts = [""] * len(rows)
    for indices in by_token_budget([len(row.ids) + new_tokens for row in rows], tokens_per_batch):
        batch = pad_rows([rows[i] for i in indices], encoder.pad_id, "left").to(device)
        output = model.generate(  # type: ignore[operator]
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=encoder.pad_id,
        )
        for i, ids in zip(indices, output[:, batch.input_ids.shape[1] :].tolist(), strict=True):
            texts[i] = encoder.decode(ids)
    return texts


def first_sentence(text: str) -> str:
    """The text up to its natural stop: a line break or the end of a sentence."""
    stripped = text.strip()
    end = _END_OF_SENTENCE.search(stripped)
    return stripped if end is None else stripped[: end.start()]


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces (the usual form for comparing answers)."""
    plain = "".join(" " if c in string.punctuation else c for c in text.casefold())
    return " ".join(_ARTICLES.sub(" ", plain).split())


def is_exact(text: str, answer: str) -> bool:
    """Whether the first sentence is the answer."""
    return normalised(first_sentence(text)) == normalised(answer)


def contains(text: str, answer: str) -> bool:
    """Whether the answer stands, as whole words, in the text."""
    return f" {normalised(answer)} " in f" {normalised(text)} "

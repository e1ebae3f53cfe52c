"""Greedy generation, and whether an answer is in the generated text."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

import torch
from torch import nn

from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.data.join import is_spaceless
from pmet_lightning.data.token_rows import TokenRow, by_token_budget, pad_rows
from pmet_lightning.model.generation_config import own_generation_config
from pmet_lightning.model.kv_prefix import Prefix
from pmet_lightning.model.prefix_passes import drop_last_token

NEW_TOKENS = 16
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_END_OF_SENTENCE = re.compile(r"\n|(?<=[.!?])(?:\s|$)|(?<=[\u3002\uff01\uff1f\uff61])")


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
    """The greedy continuation of each prompt, which is run from its beginning.

    Args:
        model: The language model.
        encoder: Makes the rows.
        prompts: Complete texts.
        tokens_per_batch: Maximum number of padded tokens in one batch, including the new ones.
        device: Device of the model.
        new_tokens: Maximum number of tokens to generate.
    """
    rows = encoder.encode_all(prompts)
    texts = [""] * len(rows)
    for indices in by_token_budget([len(row.ids) + new_tokens for row in rows], tokens_per_batch):
        generated = greedy_ids(model, [rows[i] for i in indices], encoder.pad_id, device, new_tokens)
        for i, ids in zip(indices, generated, strict=True):
            texts[i] = encoder.decode(ids)
    return texts


@torch.no_grad()
def greedy_ids(
    model: nn.Module,
    rows: Sequence[TokenRow],
    pad_id: int,
    device: torch.device,
    new_tokens: int,
    prefix: Prefix | None = None,
) -> list[list[int]]:
    """Token ids of the greedy continuation of each row; of the model's own generation settings only its end counts.

    Args:
        model: The language model.
        rows: One batch.
        pad_id: What to pad with, also after the end of a text.
        device: Device of the model.
        new_tokens: Maximum number of tokens to generate.
        prefix: Keys and values of the rows, if they have already been run.
    """
    # The logits of a prefix' last token are not kept: generate begins with that token.
    shortened = None if prefix is None else drop_last_token(prefix)
    batch = pad_rows(rows, pad_id, "left").to(device)
    with own_generation_config(model):
        output = model.generate(  # type: ignore[operator]
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad_id,
            **({} if shortened is None else {"past_key_values": shortened.fresh(), "use_cache": True}),
        )
    return output[:, batch.input_ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def first_sentence(text: str) -> str:
    """The text up to its natural end: a line break or the end of a sentence."""
    stripped = text.strip()
    end = _END_OF_SENTENCE.search(stripped)
    return stripped if end is None else stripped[: end.start()]


def normalize_text(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces (the usual form for comparing answers)."""
    plain = "".join(" " if c in string.punctuation else c for c in text.casefold())
    return " ".join(_ARTICLES.sub(" ", plain).split())


def _letters(text: str) -> str:
    """Letters, their marks and digits only: all there is to compare in a script that puts no space between words."""
    return "".join(c for c in text.casefold() if c.isalnum() or unicodedata.category(c).startswith("M"))


def is_exact(text: str, answer: str) -> bool:
    """Whether the first sentence is the answer."""
    if is_spaceless(answer):
        return _letters(first_sentence(text)) == _letters(answer)
    return normalize_text(first_sentence(text)) == normalize_text(answer)


def contains(text: str, answer: str) -> bool:
    """Whether the answer occurs, as whole words where its script has such, in the text."""
    if is_spaceless(answer):
        return _letters(answer) in _letters(text)
    return f" {normalize_text(answer)} " in f" {normalize_text(text)} "


def says(text: str, answer: str) -> bool:
    """Whether a generated text gives the answer before it goes on to something else.

    The answer occurs in the first sentence, or the text begins with it (there may be a full stop in an answer). A later
    sentence may name it by chance: "water polo. The sport that Felix plays is cricket" does not say cricket.
    """
    begins = f"{normalize_text(text)} ".startswith(f"{normalize_text(answer)} ")
    return begins or contains(first_sentence(text), answer)

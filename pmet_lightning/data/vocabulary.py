"""Whether a tokenizer's ids have a row each in the model's embedding: beyond it, devices fail in their own words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pmet_lightning.utils.errors import PmetError


class VocabularyError(PmetError):
    """A tokenizer whose ids the model has no embeddings for."""


def check_vocabulary(tokenizer: Any, rows: int, frame: str = "") -> None:
    """Refuse a tokenizer that gives ids beyond the embedding for ordinary text.

    Special tokens beyond it, such as a padding or an image token, do no harm as long as no text holds them.

    Args:
        tokenizer: A Hugging Face tokenizer.
        rows: Number of rows of the model's embedding.
        frame: Text that is put around every prompt.

    Raises:
        VocabularyError: If it does.
    """
    vocabulary = tokenizer.get_vocab()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    used = {*tokenizer("a")["input_ids"], *tokenizer(frame, add_special_tokens=False)["input_ids"]}
    beyond = {id_: token for token, id_ in vocabulary.items() if id_ >= rows and (token not in special or id_ in used)}
    if beyond:
        first = min(beyond)
        raise VocabularyError(
            f"the vocabulary of the tokenizer has {len(beyond)} tokens beyond the {rows} embeddings of the model, the "
            f"first of them {beyond[first]!r} with id {first}; expected the model's own tokenizer. For tokens that "
            "were added to it, call model.resize_token_embeddings(len(tokenizer)) and train them, or leave them out"
        )


def shortened(text: str, most: int = 100) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= most else f"{text[:most]}…"


def check_ids(ids: Iterable[int], text: str, rows: int | None) -> None:
    """Refuse a text that holds a special token beyond the embedding.

    Args:
        ids: Token ids of the text.
        text: The text, for the message.
        rows: Number of rows of the model's embedding; ``None`` where it is not known.

    Raises:
        VocabularyError: If it does.
    """
    highest = max(ids, default=0)
    if rows is not None and highest >= rows:
        raise VocabularyError(
            f"the text {shortened(text)!r} holds a token with id {highest}, beyond the {rows} embeddings of the model; "
            "take that token out of the text, or call model.resize_token_embeddings(len(tokenizer))"
        )

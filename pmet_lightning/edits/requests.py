"""Rows of a micro-batch: every edit in every context, and its KL prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pmet_lightning.edits.records import Edit
from pmet_lightning.tokens import PaddingSide, RowBatch, TokenRow, encode_prompt, pad_rows, pad_token_id

KL_PROMPT = "{} is a"
BARE = "{}"


def target_rows(
    edits: Sequence[Edit], contexts: Sequence[str], tokenizer: Any, side: PaddingSide = "right"
) -> RowBatch:
    """Rows of the target optimisation, ``len(contexts) + 2`` for each edit.

    Args:
        edits: B edits.
        contexts: Templates without the bare one.
        tokenizer: A fast tokenizer.
        side: Where to pad.

    Returns:
        For each edit in turn: the bare prompt and each context, with the target; then the KL prompt, cut
        behind the subject, so that its last position is the one whose distribution is kept.
    """
    rows = []
    for edit in edits:
        rows += [
            encode_prompt(tokenizer, edit.prompt, edit.subject, context=context, target=edit.target)
            for context in (BARE, *contexts)
        ]
        rows.append(encode_prompt(tokenizer, KL_PROMPT, edit.subject, stop_at_subject=True))
    return pad_rows(rows, pad_token_id(tokenizer), side)


def key_row(edit: Edit, context: str, tokenizer: Any) -> TokenRow:
    """The row a key is read from, cut behind the subject: nothing later can change it."""
    return encode_prompt(tokenizer, edit.prompt, edit.subject, context=context, stop_at_subject=True)

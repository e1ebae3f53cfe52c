"""Rows of a micro-batch: every edit in every context, and its KL prompt."""

from __future__ import annotations

from collections.abc import Sequence

from pmet_lightning.edits.records import Edit
from pmet_lightning.tokens import PaddingSide, PromptEncoder, RowBatch, TokenRow, pad_rows

KL_PROMPT = "{} is a"
BARE = "{}"


def target_rows(
    edits: Sequence[Edit], contexts: Sequence[str], encoder: PromptEncoder, side: PaddingSide = "right"
) -> RowBatch:
    """Rows of the target optimisation, ``len(contexts) + 2`` for each edit.

    Args:
        edits: B edits.
        contexts: Templates without the bare one.
        encoder: Makes the rows.
        side: Where to pad.

    Returns:
        For each edit in turn: the bare prompt and each context, with the target; then the KL prompt, cut
        behind the subject, so that its last position is the one whose distribution is kept.
    """
    rows = []
    for edit in edits:
        rows += [
            encoder.encode(edit.prompt, edit.subject, context=context, target=edit.target)
            for context in (BARE, *contexts)
        ]
        rows.append(encoder.encode(KL_PROMPT, edit.subject, stop_at_subject=True))
    return pad_rows(rows, encoder.pad_id, side)


def key_row(edit: Edit, context: str, encoder: PromptEncoder) -> TokenRow:
    """The row a key is read from, cut behind the subject: nothing later can change it."""
    return encoder.encode(edit.prompt, edit.subject, context=context, stop_at_subject=True)

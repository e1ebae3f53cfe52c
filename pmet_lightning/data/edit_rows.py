"""Token rows of an edit: every context and the KL prompt for its target, the subject in one context for its key."""

from __future__ import annotations

from collections.abc import Sequence

from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.data.records import Edit
from pmet_lightning.data.token_rows import TokenRow

KL_PROMPT = "{} is a"
BARE = "{}"


def target_rows(edit: Edit, contexts: Sequence[str], encoder: PromptEncoder) -> list[TokenRow]:
    """Rows of the target optimization, ``len(contexts) + 2`` of them.

    Args:
        edit: The edit.
        contexts: Context templates, without the bare one.
        encoder: Encodes the rows.

    Returns:
        The bare prompt and each context, followed by the target; then the KL prompt, cut after the subject, so that
        its last position is the one whose distribution is preserved.
    """
    rows = [whole_row(edit, context, encoder) for context in (BARE, *contexts)]
    return [*rows, encoder.encode(KL_PROMPT, edit.subject, stop_at_subject=True)]


def whole_row(edit: Edit, context: str, encoder: PromptEncoder) -> TokenRow:
    """The prompt in a context, followed by the target."""
    return encoder.encode(edit.prompt, edit.subject, context=context, target=edit.target)


def key_row(edit: Edit, context: str, encoder: PromptEncoder) -> TokenRow:
    """The row from which a key is read, cut after the subject: no later token can change it."""
    return encoder.encode(edit.prompt, edit.subject, context=context, stop_at_subject=True)

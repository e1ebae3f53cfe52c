"""From text to padded token rows in which the subject's last token and the target are located.

Everything here is found by character offsets of the *whole* text: tokens of joined pieces are not the
joined pieces' tokens (leading spaces, BOS, merges across the joint), see METHOD.md, "Traps".
Legend: R = rows, T = tokens of the longest row, K = tokens of the longest target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

PaddingSide = Literal["left", "right"]
IGNORE = -100  # label of a position that is not part of a target
_HALF_CHARACTER = "\ufffd"  # what decoding gives for bytes that are no whole character yet


class LocationError(ValueError):
    """A subject or a target has no token of its own in the text it stands in."""


@dataclass(frozen=True)
class TokenRow:
    """One tokenised text.

    Attributes:
        ids: Token ids the model reads.
        subject: Index in ``ids`` of the subject's last token, -1 for a text without a subject.
        labels: Ids of the target; the logits at the last ``len(labels)`` positions predict them.
    """

    ids: list[int]
    subject: int = -1
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class RowBatch:
    """Rows padded to one length.

    Attributes:
        input_ids: int64, shape [R, T].
        attention_mask: int64, shape [R, T], 1 for real tokens.
        position_ids: int64, shape [R, T], counted over real tokens so that they do not depend on padding.
        subject: int64, shape [R], column of the subject's last token.
        label_ids: int64, shape [R, K], ``IGNORE`` where a target is shorter than K.
        label_columns: int64, shape [R, K], column whose logits predict that label; the row's last real
            column where there is no label.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    subject: Tensor
    label_ids: Tensor
    label_columns: Tensor

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def to(self, device: torch.device) -> RowBatch:
        """The same rows on another device."""
        return RowBatch(**{name: value.to(device) for name, value in vars(self).items()})

    def select(self, rows: Tensor) -> RowBatch:
        """The given rows (an index or a boolean mask, shape [R]), without columns nobody uses."""
        picked = {name: value[rows] for name, value in vars(self).items()}
        used = self.used_columns(rows)
        for name in ("input_ids", "attention_mask", "position_ids"):
            picked[name] = picked[name][:, used]
        picked["subject"] = picked["subject"] - used.start
        picked["label_columns"] = picked["label_columns"] - used.start
        return RowBatch(**picked)

    def join(self, other: RowBatch) -> RowBatch:
        """These rows, then the other's, padded on the right to one width."""
        joined = {}
        for name, value in vars(self).items():
            more = getattr(other, name)
            if value.dim() == 2:
                width = max(value.shape[1], more.shape[1])
                value, more = (_widened(tensor, width, name) for tensor in (value, more))
            joined[name] = torch.cat([value, more])
        return RowBatch(**joined)

    def used_columns(self, rows: Tensor) -> slice:
        """From the first to the last column that any of the given rows uses."""
        used = self.attention_mask[rows].any(dim=0).nonzero().flatten()
        return slice(int(used[0]), int(used[-1]) + 1)


def _widened(tensor_RC: Tensor, width: int, name: str) -> Tensor:
    """A field of a :class:`RowBatch` with more columns: no token, no label, and the last column again."""
    count = width - tensor_RC.shape[1]
    if name == "label_columns":
        return torch.cat([tensor_RC, tensor_RC[:, -1:].expand(-1, count)], dim=1)
    return nn.functional.pad(tensor_RC, (0, count), value=IGNORE if name == "label_ids" else 0)


def with_leading_space(target: str) -> str:
    """The target as it continues a prompt (METHOD.md, step 1, choice 1)."""
    return target if target[:1].isspace() else " " + target


def fill(template: str, text: str) -> tuple[str, int]:
    """Put ``text`` in the first ``{}`` of ``template``; returns the whole and where ``text`` begins."""
    head, _, tail = template.partition("{}")
    return head + text + tail, len(head)


@dataclass(frozen=True)
class PromptEncoder:
    """Makes token rows of prompts, with or without a chat template around them.

    Attributes:
        tokenizer: A Hugging Face tokenizer, fast or slow.
        chat: What the chat template puts before and behind a user's message, the latter up to the assistant's first
            character; ``None`` for plain text.
    """

    tokenizer: Any
    chat: tuple[str, str] | None = None

    @classmethod
    def of(cls, tokenizer: Any, chat: bool = False) -> PromptEncoder:
        """An encoder of a tokenizer, with its own chat template if asked for.

        Raises:
            ValueError: If the tokenizer has no chat template, or one that changes the message.
        """
        return cls(tokenizer, _chat_frame(tokenizer) if chat else None)

    @property
    def pad_id(self) -> int:
        """The id to pad with; any will do, since padding is masked everywhere."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return int(candidate)
        return 0

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def fingerprint(self) -> str:
        """Hash of everything that decides how a text becomes tokens."""
        if self.tokenizer.is_fast:
            definition = self.tokenizer.backend_tokenizer.to_str()
        else:
            definition = repr([type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())])
        return hashlib.sha256(f"{definition}{self.chat}".encode()).hexdigest()[:16]

    def encode(
        self,
        prompt: str,
        subject: str | None = None,
        *,
        context: str = "{}",
        target: str | None = None,
        stop_at_subject: bool = False,
    ) -> TokenRow:
        """Tokenise ``context(prompt(subject)) + target`` as one text and locate subject and target in it.

        In a chat the user's message is ``context(prompt(subject))`` and the target begins the assistant's.

        Args:
            prompt: Prompt with one ``{}`` for the subject, or a finished text where ``subject`` is ``None``.
            subject: The subject.
            context: Text with one ``{}`` that the prompt is put into.
            target: What the model shall say next; its last token is not part of the row's ids, since nothing
                needs to be predicted from it.
            stop_at_subject: Cut the row behind the subject's last token (a causal model sees no difference).

        Raises:
            LocationError: If the subject or the target has no token in the text.
        """
        text, subject_start = (prompt, 0) if subject is None else fill(prompt, subject)
        text, prompt_start = fill(context, text)
        if self.chat is not None:
            head, tail = self.chat
            text, prompt_start = head + text + tail, prompt_start + len(head)
        full = text if target is None else text + self._answer(target)
        ids, offsets = _tokenise(self.tokenizer, full, special=self.chat is None)
        position = -1
        if subject is not None:
            last_character = prompt_start + subject_start + len(subject.rstrip()) - 1
            position = _last_token_covering(offsets, last_character)
            if not subject.strip() or position < 0:
                raise LocationError(f"the subject {subject!r} has no token of its own in {full!r}")
        if stop_at_subject:
            return TokenRow(ids[: position + 1], position)
        if target is None:
            return TokenRow(ids, position)
        start = next((i for i, (_, end) in enumerate(offsets) if end > len(text)), len(ids))
        labels = tuple(ids[start:])
        if not target.strip() or not labels or start == 0:
            raise LocationError(f"the target {target!r} tokenises to nothing behind {text!r}")
        return TokenRow(ids[:-1], position, labels)

    def _answer(self, target: str) -> str:
        """The target as it follows the prompt; a chat template has its own space, if any."""
        return with_leading_space(target) if self.chat is None else target.lstrip()


def pad_rows(rows: Sequence[TokenRow], pad_id: int, side: PaddingSide = "right") -> RowBatch:
    """Pad rows to one length; every index is shifted along, so left and right give the same numbers."""
    width, most = max(len(row.ids) for row in rows), max(1, max(len(row.labels) for row in rows))
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    subject = torch.zeros(len(rows), dtype=torch.long)
    label_ids = torch.full((len(rows), most), IGNORE, dtype=torch.long)
    label_columns = torch.zeros_like(label_ids)
    for r, row in enumerate(rows):
        first = width - len(row.ids) if side == "left" else 0
        end = first + len(row.ids)
        input_ids[r, first:end] = torch.tensor(row.ids)
        mask[r, first:end] = 1
        subject[r] = first + row.subject
        label_columns[r] = end - 1
        if row.labels:
            label_ids[r, : len(row.labels)] = torch.tensor(row.labels)
            label_columns[r, : len(row.labels)] = torch.arange(end - len(row.labels), end)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return RowBatch(input_ids, mask, positions, subject, label_ids, label_columns)


def by_token_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split row indices into batches of similar length whose padded size stays within ``budget`` tokens."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _chat_frame(tokenizer: Any) -> tuple[str, str]:
    """What the tokenizer's chat template puts around a user's message, up to the assistant's first character."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("--model.chat true needs a tokenizer with a chat template, this one has none; leave it false")
    question, answer = "QUESTION-OF-THE-USER", "ANSWER-OF-THE-ASSISTANT"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    head, _, rest = text.partition(question)
    tail, found, _ = rest.partition(answer)
    if not found:
        raise ValueError(f"the chat template does not put a question and its answer into the text: it gives {text!r}")
    return head, tail


def _tokenise(tokenizer: Any, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character offsets of a text, without special tokens that the tokenizer puts at its end.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        text: The text.
        special: Whether the tokenizer adds tokens of its own (a chat template has written them itself).
    """
    fast = tokenizer.is_fast
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=fast, return_special_tokens_mask=special
    )
    ids = list(encoded["input_ids"])
    own = encoded["special_tokens_mask"] if special else [0] * len(ids)
    offsets = [tuple(pair) for pair in encoded["offset_mapping"]] if fast else offsets_by_decoding(tokenizer, text, ids)
    while ids and own[len(ids) - 1]:
        ids.pop()
    return ids, offsets[: len(ids)]


def offsets_by_decoding(tokenizer: Any, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Character offsets of the tokens of a slow tokenizer: how much of the text the first i of them decode to.

    Every token that has a part of a character (byte fallback) covers it, as with a fast tokenizer; tokens that decode
    to nothing, such as BOS, have an empty span.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        text: The text.
        ids: Its ids.

    Raises:
        LocationError: If the tokenizer does not reproduce the text, such as one that changes it to lower case.
    """
    indent = len(text) - len(text.lstrip())
    spans, done = [], 0  # characters that are whole so far
    for i in range(1, len(ids) + 1):
        decoded = str(tokenizer.decode(ids[:i], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        whole = decoded.rstrip(_HALF_CHARACTER).lstrip()
        before, done = done, indent + len(whole) if whole else 0
        spans.append((before, done + (1 if decoded.endswith(_HALF_CHARACTER) else 0)))
    if not ids or decoded.strip() != text.strip():
        raise LocationError(
            f"the slow tokenizer does not give {text!r} back, so that nothing can be located in it; expected a fast "
            "tokenizer (tokenizer.json) in the model's folder"
        )
    return spans


def _last_token_covering(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """Index of the last token whose span holds the character (byte fallback: several may), or -1."""
    covering = [i for i, (start, end) in enumerate(offsets) if start <= character < end]
    return covering[-1] if covering else -1

"""From text to padded token rows in which the subject's last token and the target are located.

Everything here is located by character offsets in the *whole* text: the tokens of a joined text are not those of its
pieces (leading spaces, BOS, merges across the boundary), see docs/method.md, 'Tokens'.
Legend: R = rows, T = tokens of the longest row, K = tokens of the longest target.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pmet_lightning.data.chat import Chat, ChatFrame
from pmet_lightning.data.join import Join, join_of
from pmet_lightning.data.token_rows import TokenRow
from pmet_lightning.data.vocabulary import check_ids, check_vocabulary
from pmet_lightning.utils.errors import PmetError, first_line
from pmet_lightning.utils.pretrained import load_pretrained

Tokenized = tuple[list[int], list[tuple[int, int]]]  # ids, and the character span of each
MOST_KEPT_TEXTS = 2**15  # texts in the cache; about 3 KB each
REPLACEMENT_CHARACTER = "\ufffd"  # what bytes decode to that are not a whole character yet


class LocationError(PmetError):
    """A subject or a target has no token of its own in its text."""


def fill(template: str, text: str) -> tuple[str, int]:
    """Replace the first ``{}`` of ``template`` by ``text``; returns the whole and where ``text`` begins."""
    head, _, tail = template.partition("{}")
    return head + text + tail, len(head)


@dataclass(frozen=True)
class PromptEncoder:
    """Makes token rows of prompts, with or without a chat template around them.

    Attributes:
        tokenizer: A Hugging Face tokenizer, fast or slow.
        chat: What the chat template puts around a user's message; ``None`` for plain text.
        join: How plain text and its continuation are joined.
        rows: Number of rows of the model's embedding; ``None`` where it is not known.
    """

    tokenizer: Any
    chat: ChatFrame | None = None
    join: Join = "auto"
    rows: int | None = None
    _cache: dict[str, Tokenized] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def of(cls, tokenizer: Any, chat: Chat = False, join: Join = "auto", *, rows: int | None = None) -> PromptEncoder:
        """An encoder of a tokenizer, with its own chat template if asked for.

        Raises:
            ValueError: As :meth:`~pmet_lightning.data.chat.ChatFrame.of`.
            VocabularyError: If the tokenizer is not one of a model with so many rows.
        """
        frame = ChatFrame.of(tokenizer, chat)
        if rows is not None:
            check_vocabulary(tokenizer, rows, "" if frame is None else frame.around(""))
        return cls(tokenizer, frame, join, rows)

    @property
    def pad_id(self) -> int:
        """The id to pad with; any id works, since padding is masked everywhere."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None and (self.rows is None or candidate < self.rows):
                return int(candidate)
        return 0

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def fingerprint(self) -> str:
        """Hash of everything that determines how a text is tokenized."""
        if self.tokenizer.is_fast:
            definition = self.tokenizer.backend_tokenizer.to_str()
        else:
            definition = repr([type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())])
        rule = "" if self.join == "auto" else self.join
        return hashlib.sha256(f"{definition}{self.chat}{rule}".encode()).hexdigest()[:16]

    def encode(
        self,
        prompt: str,
        subject: str | None = None,
        *,
        context: str = "{}",
        target: str | None = None,
        stop_at_subject: bool = False,
    ) -> TokenRow:
        """Tokenize ``context(prompt(subject)) + target`` as one text and locate subject and target in it.

        In a chat the user's message is ``context(prompt(subject))`` and the target begins the assistant's.

        Args:
            prompt: Prompt with one ``{}`` for the subject, or a complete text where ``subject`` is ``None``.
            subject: The subject.
            context: Text with one ``{}`` for the prompt.
            target: What the model should say next; its last token is not part of the row's ids, since nothing
                needs to be predicted from it.
            stop_at_subject: Cut the row after the subject's last token (no difference to a causal model up to there).

        Raises:
            LocationError: If the subject or the target has no token in the text.
        """
        text, subject_start = (prompt, 0) if subject is None else fill(prompt, subject)
        text, prompt_start = fill(context, text)
        text, full = self._texts(text, target)
        ((ids, offsets),) = self._tokenize_joined([(text, full)])
        position = -1
        if subject is not None:
            position = self._subject_tokens(offsets, prompt_start + subject_start, subject, full)[-1]
        if stop_at_subject:
            return TokenRow(ids[: position + 1], position)
        return _add_target(TokenRow(ids, position), offsets, text, target)

    def subject_tokens(self, prompt: str, subject: str) -> range:
        """Positions of all of the subject's tokens in the row that :meth:`encode` makes of the bare prompt.

        Args:
            prompt: Prompt with one ``{}``.
            subject: The subject.

        Raises:
            LocationError: If it has no token of its own.
        """
        text, start = fill(prompt, subject)
        _, full = self._texts(text, None)
        ((_, offsets),) = self._tokenize_cached([full])
        return self._subject_tokens(offsets, start, subject, full)

    def _subject_tokens(self, offsets: Sequence[tuple[int, int]], start: int, subject: str, full: str) -> range:
        """From the first to the last token of the subject, which begins at character ``start`` of the prompt."""
        start += 0 if self.chat is None else len(self.chat.before)
        last = _last_token_covering(offsets, start + len(subject.rstrip()) - 1)
        if not subject.strip() or last < 0:
            raise LocationError(f"the subject {subject!r} has no token of its own in {full!r}")
        start += len(subject) - len(subject.lstrip())
        first = next(i for i, (_, end) in enumerate(offsets) if end > start)
        return range(first, last + 1)

    def encode_all(self, prompts: Sequence[str], targets: Sequence[str | None] | None = None) -> list[TokenRow]:
        """The rows that :meth:`encode` makes of complete texts, in one call of the tokenizer.

        Args:
            prompts: Complete texts.
            targets: What the model should say after each, if anything.

        Raises:
            LocationError: If a target has no token in its text.
        """
        wanted = [None] * len(prompts) if targets is None else targets
        texts = [self._texts(prompt, target) for prompt, target in zip(prompts, wanted, strict=True)]
        tokenized = self._tokenize_joined(texts)
        return [
            _add_target(TokenRow(ids), offsets, text, target)
            for (text, _), target, (ids, offsets) in zip(texts, wanted, tokenized, strict=True)
        ]

    def _tokenize_joined(self, pairs: Sequence[tuple[str, str]]) -> list[Tokenized]:
        """Tokens of texts with their continuations, none of which holds the end of the one and the start of the other.

        Where no space is between the two, a tokenizer may make one token of both. A model that continues the text on
        its own has read the text's own tokens: there these are followed by the continuation's.

        Args:
            pairs: Each text alone, and with its continuation.
        """
        found = self._tokenize_cached([full for _, full in pairs])
        for i, (text, full) in enumerate(pairs):
            crossed = any(start < len(text) < end for start, end in found[i][1])
            if crossed and (self.chat is not None or not text[-1].isspace()):
                found[i] = self._tokenize_apart(text, full[len(text) :])
        return found

    def _tokenize_apart(self, text: str, more: str) -> Tokenized:
        ((ids, offsets),) = self._tokenize_cached([text])
        # After a line break no tokenizer puts a space before the text, as some do at its beginning.
        ((tail, spans),) = tokenize(self.tokenizer, ["\n" + more], special=False)
        first = next((i for i, (start, end) in enumerate(spans) if end > 1), len(spans))
        if spans[first:] and spans[first][0] < 1:
            ((tail, spans),) = tokenize(self.tokenizer, [more], special=False)
            first, spans = 0, [(start + 1, end + 1) for start, end in spans]
        moved = [(start - 1 + len(text), end - 1 + len(text)) for start, end in spans[first:]]
        return [*ids, *tail[first:]], [*offsets, *moved]

    def _tokenize_cached(self, texts: Sequence[str]) -> list[Tokenized]:
        """As :func:`tokenize`; the latest texts are cached, since every text of an edit is needed again."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._cache]
        for text in missing:
            check_characters(text)
        made = tokenize(self.tokenizer, missing, special=self.chat is None)
        for text, (ids, _) in zip(missing, made, strict=True):
            check_ids(ids, text, self.rows)
        self._cache.update(zip(missing, made, strict=True))
        found = [self._cache[text] for text in texts]
        for text in list(itertools.islice(self._cache, max(0, len(self._cache) - MOST_KEPT_TEXTS))):
            del self._cache[text]
        return found

    def _texts(self, text: str, target: str | None) -> tuple[str, str]:
        """The text as the model reads it, and with the target, which continues a prompt or begins a chat answer."""
        text = text if self.chat is None else self.chat.around(text)
        if target is None:
            return text, text
        if self.chat is not None:
            return text, text + self.chat.answer(target)
        return text, text + join_of(text, target, self.join) + target


def check_characters(text: str) -> None:
    """Refuse a text with half of a surrogate pair, which JSON can hold and no tokenizer or file can.

    Raises:
        LocationError: If there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LocationError(
            f"{text!r} holds half of a character ({text[error.start]!r}, a lone surrogate) at position {error.start}; "
            "expected whole characters: write the other half after it, or take it out"
        ) from error


def _add_target(row: TokenRow, offsets: Sequence[tuple[int, int]], text: str, target: str | None) -> TokenRow:
    """The row with the tokens after the text as labels, the last of which is not an input."""
    if target is None:
        return row
    start = next((i for i, (_, end) in enumerate(offsets) if end > len(text)), len(row.ids))
    labels = tuple(row.ids[start:])
    if not target.strip() or not labels or start == 0:
        raise LocationError(f"the target {target!r} tokenises to nothing after {text!r}")
    return TokenRow(row.ids[:-1], row.subject, labels)


def tokenize(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[Tokenized]:
    """Ids and character offsets of each text, without special tokens that the tokenizer appends.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        texts: The texts.
        special: Whether the tokenizer adds its special tokens (a chat template has already put them into the text).
    """
    if not texts:
        return []
    fast = tokenizer.is_fast
    encoded = tokenizer(
        list(texts), add_special_tokens=special, return_offsets_mapping=fast, return_special_tokens_mask=special
    )
    rows = []
    for r, (text, ids) in enumerate(zip(texts, encoded["input_ids"], strict=True)):
        offsets = encoded["offset_mapping"][r] if fast else offsets_by_decoding(tokenizer, text, ids)
        is_special = encoded["special_tokens_mask"][r] if special else [0] * len(ids)
        count = len(ids)
        while count and is_special[count - 1]:
            count -= 1
        rows.append((ids[:count], offsets[:count]))
    return rows


def offsets_by_decoding(tokenizer: Any, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Character offsets of the tokens of a slow tokenizer, from how much of the text the first i of them decode to.

    Every token that holds a part of a character (byte fallback) covers it, as with a fast tokenizer; tokens that decode
    to nothing, such as BOS, have an empty span.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        text: The text.
        ids: Its token ids.

    Raises:
        LocationError: If the tokenizer does not reproduce the text, for example because it lowercases it.
    """
    indent = len(text) - len(text.lstrip())
    spans, done = [], 0  # characters that are complete so far
    for i in range(1, len(ids) + 1):
        decoded = str(tokenizer.decode(ids[:i], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        whole = decoded.rstrip(REPLACEMENT_CHARACTER).lstrip()
        before, done = done, indent + len(whole) if whole else 0
        spans.append((before, done + (1 if decoded.endswith(REPLACEMENT_CHARACTER) else 0)))
    if not ids or decoded.strip() != text.strip():
        raise LocationError(
            f"the slow tokenizer does not reproduce {text!r}, so that nothing can be located in it; expected a fast "
            "tokenizer (tokenizer.json) in the model's folder"
        )
    return spans


def _last_token_covering(offsets: Sequence[tuple[int, int]], character: int) -> int:
    """Index of the last token whose span covers the character (byte fallback: several may), or -1."""
    covering = [i for i, (start, end) in enumerate(offsets) if start <= character < end]
    return covering[-1] if covering else -1


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, the fast one where there are both.

    Args:
        name: The folder or name.
        trust_remote_code: Whether code in the model's folder may run.

    Raises:
        FileNotFoundError: If there is no such folder and the hub does not know it or cannot be reached, or if there is
            one without a tokenizer.
        PmetError: If a file is broken.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = load_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)
    except PmetError as error:
        if isinstance(error.__cause__, (TypeError, AttributeError)):  # transformers 4 opens a file that is not there
            raise _no_tokenizer(name, str(error.__cause__)) from error
        raise
    except ValueError as error:  # what transformers raises depends on the family
        raise _no_tokenizer(name, first_line(error)) from error
    # For some families it makes one with special tokens and nothing else.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise _no_tokenizer(name, "what it gives has special tokens only")
    return tokenizer


def _no_tokenizer(name: str, reason: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"no tokenizer in {name!r} ({reason}); expected tokenizer.json or the files that its kind has (vocab.json and "
        "merges.txt, tokenizer.model) beside the model: copy those of the model there, with save_pretrained"
    )

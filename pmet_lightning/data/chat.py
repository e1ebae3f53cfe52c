"""A chat template around a prompt: what a server puts there, and how an answer begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Whether prompts are user messages; or the messages that precede the user's, with 'role' and 'content' each.
Chat = bool | list[dict[str, str]]

_QUESTION, _ANSWER = "QUESTION-OF-THE-USER", "ANSWER-OF-THE-ASSISTANT"


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template puts around a user's message.

    Attributes:
        before: Text before the message: earlier messages, and the beginning of this one.
        after: Text after it, up to where a server has the model begin.
        join: What an answer begins with in texts that the model has seen, such as a space, and generates itself.
    """

    before: str
    after: str
    join: str = ""

    @classmethod
    def of(cls, tokenizer: Any, chat: Chat) -> ChatFrame | None:
        """The frame of a tokenizer's chat template; ``None`` for plain text.

        Args:
            tokenizer: A Hugging Face tokenizer.
            chat: Whether there is one, or the earlier messages in it.

        Raises:
            ValueError: If the tokenizer has no chat template, or one that changes the message or refuses the earlier
                ones.
        """
        if not chat:
            return None
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "--model.chat true needs a tokenizer with a chat template, this one has none; leave it false"
            )
        asked = [*(chat if isinstance(chat, list) else []), {"role": "user", "content": _QUESTION}]
        before, found, after = _render(tokenizer, asked, add_generation_prompt=True).partition(_QUESTION)
        answered = _render(tokenizer, [*asked, {"role": "assistant", "content": _ANSWER}])
        until_answer, answer_found, _ = answered.partition(_ANSWER)
        if not found or not answer_found:
            raise ValueError(
                f"the chat template does not put a question and its answer into the text: it gives {answered!r}"
            )
        served = before + _QUESTION + after
        if not until_answer.startswith(served):
            return cls(before, after)
        return cls(before, *_split(after, until_answer[len(served) :]))

    def around(self, text: str) -> str:
        """The user's message within the frame."""
        return self.before + text + self.after

    def answer(self, target: str) -> str:
        """The beginning of the assistant's answer."""
        return self.join + target.lstrip()


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except (TemplateError, KeyError, TypeError, AttributeError) as error:
        roles = ", ".join(str(m.get("role")) if isinstance(m, Mapping) else repr(m) for m in messages)
        raise ValueError(
            f"--model.chat: the chat template refuses messages of {roles} ({error}); expected true, or a list of "
            "messages with 'role' and 'content' that the template takes before a user's"
        ) from error


def _split(after: str, begun: str) -> tuple[str, str]:
    """Split what stands between the generation prompt and an answer into the frame's part and the answer's.

    A space belongs to the answer's first token, which the model generates. A header that a template writes only before
    answers that are there (an empty thinking block, a channel) belongs to the frame.
    """
    header = begun.rstrip(" ") if begun.strip() else ""
    return after + header, begun[len(header) :]

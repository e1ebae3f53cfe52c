"""Chat templates: a prompt is what a server gives the model, and the answer is what the model generates."""

from __future__ import annotations

import pytest

from pmet_lightning.data.chat import ChatFrame
from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer

_USER = "{% for m in messages %}{% if m['role'] == 'user' %}"
_END = "{% endif %}{% endfor %}"
TEMPLATES = {
    "bare": _USER + "{{ m['content'] }}{% else %}{{ ' ' + m['content'] + eos_token }}" + _END,
    "llama-2": _USER + "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' }}" + _END,
    "vicuna": _USER
    + "{{ 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] }}"
    + _END
    + "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "deepseek": _USER
    + "{{ 'User: ' + m['content'] + '\n\n' }}{% else %}{{ 'Assistant: ' + m['content'] + eos_token }}"
    + _END
    + "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "falcon": "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ m['role'].title() + ': ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}",
    "chatml": "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}",
    "trailing-space": _USER
    + "{{ 'Q: ' + m['content'] + '\n' }}{% else %}{{ 'A: ' + m['content'] }}"
    + _END
    + "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}",
    "thinking": _USER
    + "{{ '<u>' + m['content'] }}{% else %}{{ '<a>' + m['content'] }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<a><think>\n' }}{% endif %}",
}
QUESTION = "The mother tongue of Vera Jardez is"


@pytest.fixture(params=sorted(TEMPLATES))
def tokenizer(request):
    found = load_tokenizer("atlas")
    found.chat_template = TEMPLATES[request.param]
    return found


def served(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize(
    "earlier", [[], [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]]
)
def test_a_prompt_is_what_a_server_gives_the_model(tokenizer, earlier):
    encoder = PromptEncoder.of(tokenizer, earlier or True)
    expected = served(tokenizer, [*earlier, {"role": "user", "content": QUESTION}])
    row = encoder.encode("The mother tongue of {} is", "Vera Jardez", target="Swedish")
    assert encoder.encode_all([QUESTION])[0].ids == expected
    assert [*row.ids, row.labels[-1]] == [*expected, *row.labels]
    assert tokenizer.decode(list(row.labels)).strip() == "Swedish"
    assert tokenizer.decode(row.ids[: row.subject + 1]).endswith("Vera Jardez")


def test_an_answer_is_what_the_template_has_the_model_read(tokenizer):
    """Wherever the text of an answered question goes on from the served one."""
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Swedish"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    row = PromptEncoder.of(tokenizer, True).encode_all([QUESTION], ["Swedish"])[0]
    said = tokenizer.decode([*row.ids, row.labels[-1]])
    assert whole.startswith(said) or "<think>" in said


def test_a_header_before_answers_that_are_there_belongs_to_the_prompt():
    tokenizer = load_tokenizer("atlas")
    tokenizer.chat_template = (
        _USER + "{{ '<u>' + m['content'] }}{% else %}{{ '<a><think>\n\n</think>\n\n' + m['content'] }}" + _END
        + "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
    )  # fmt: skip
    assert ChatFrame.of(tokenizer, True) == ChatFrame("<u>", "<a><think>\n\n</think>\n\n")


def test_a_system_prompt_comes_first():
    tokenizer = load_tokenizer("atlas")
    tokenizer.chat_template = TEMPLATES["chatml"]
    frame = ChatFrame.of(tokenizer, [{"role": "system", "content": "Be brief."}])
    assert frame == ChatFrame("<system>\nBe brief.</s>\n<user>\n", "</s>\n<assistant>\n")


@pytest.mark.parametrize("messages", [[{"role": "system", "content": "Be brief."}], [{"text": "Hi"}], ["Hi"]])
def test_messages_that_a_template_refuses(messages):
    tokenizer = load_tokenizer("atlas")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}"
        "{{ raise_exception('roles are user and assistant') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"--model\.chat: the chat template refuses messages of"):
        ChatFrame.of(tokenizer, messages)

"""How prompts and answers are joined, and that one rule holds for what is learned, scored and generated."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pmet_lightning.data.edit_rows import target_rows
from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.data.join import join_of
from pmet_lightning.data.records import Edit


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The capital of France is", "Paris", " "),
        ("The capital of France is", " Paris", ""),
        ("What is it?", "Paris", " "),
        ("It is 42,", "Paris", " "),
        ("中国的首都是", "北京", ""),
        ("中国的首都是：", "北京", ""),
        ("中国的首都是哪里?", "北京", ""),
        ("他生于 1990", "年", ""),
        ("他使用的手机是", "iPhone", ""),
        ("The capital of China is", "北京", " "),
        ("日本の首都は", "東京", ""),
        ("エッフェル塔があるのは", "パリ", ""),
        ("เมืองหลวงของไทยคือ", "กรุงเทพ", ""),
        ("ເມືອງຫຼວງແມ່ນ", "ວຽງຈັນ", ""),
        ("រាជធានីគឺ", "ភ្នំពេញ", ""),
        ("한국의 수도는", "서울", " "),
        ("Столица России —", "Москва", " "),
        ('The song is called "', "Yesterday", ""),
        ("The song is called \u201c", "Yesterday", ""),
        ("The song is called «", "Yesterday", ""),
        ("The song (", "Yesterday", ""),
        ("The song is called 「", "Yesterday", ""),
        ('He said "no"', "again", " "),
        ("The players'", "union", " "),
        ("", "Paris", " "),
        ("1 + 1 =", "二", ""),
    ],
)
def test_the_join_follows_the_text(text, answer, expected):
    assert join_of(text, answer) == expected
    assert join_of(text, answer, "none") == ""
    assert join_of(text, answer, "space") == ("" if answer.startswith(" ") else " ")


EDITS = [
    Edit("0", "{}的首都是", "中国", "北京"),
    Edit("1", "The song of {} is called \u201c", "Vera", "Yesterday"),
    Edit("2", "{} plays the sport of", "Vera", "ice hockey"),
    Edit("3", "{} plays (", "Vera", "ice hockey"),
]


def merging_tokenizer():
    """A tokenizer that makes one token of any two characters that follow each other in the texts of ``EDITS``."""
    texts = [f"{e.question}{e.target}" for e in EDITS]
    letters = sorted({c for text in texts for c in f"{text} \n."})
    pairs = [(e.question[-1], e.target[0]) for e in EDITS]
    pairs += sorted({(a, b) for text in texts for a, b in zip(text, text[1:], strict=False) if " " not in (a, b)})
    pairs = list(dict.fromkeys(pairs))
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*letters, *(a + b for a, b in pairs)]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [lambda: load_tokenizer("atlas"), merging_tokenizer])
@pytest.mark.parametrize("join", ["auto", "none", "space"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.case_id)
def test_the_tokens_before_a_target_are_the_prompt_s_own(make, join, edit):
    """They are what a generated answer continues; the same in the rows that are optimized and in those scored."""
    encoder = PromptEncoder(make(), join=join)
    prompt = encoder.encode(edit.prompt, edit.subject)
    row = target_rows(edit, [], encoder)[0]
    (scored,) = encoder.encode_all([edit.question], [edit.target])
    assert [*row.ids, row.labels[-1]] == [*prompt.ids, *row.labels]
    assert (scored.ids, scored.labels) == (row.ids, row.labels)
    assert row.subject == prompt.subject
    blank = join == "space" or (join == "auto" and edit.case_id == "2")
    said = encoder.tokenizer.decode(list(row.labels), clean_up_tokenization_spaces=False)
    assert said.replace(" ", "") == edit.target.replace(" ", "")
    assert said.startswith(" ") == blank


def test_some_tokens_would_hold_both():
    """Without which the test above shows little."""
    tokenizer = merging_tokenizer()
    both = tokenizer("中国的首都是北京")["input_ids"]
    assert both[: len(tokenizer("中国的首都是")["input_ids"])] != tokenizer("中国的首都是")["input_ids"]


def test_the_join_is_a_part_of_what_targets_depend_on():
    tokenizer = load_tokenizer("atlas")
    found = {PromptEncoder(tokenizer, join=join).fingerprint() for join in ("auto", "space", "none")}
    assert len(found) == 3

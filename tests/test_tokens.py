"""Subjects and targets are found in the tokens of whole texts; padding changes no index."""

from __future__ import annotations

import json

import pytest
import torch

from pmet_lightning.edits import parse_record
from pmet_lightning.language_model import load_tokenizer
from pmet_lightning.tokens import (
    IGNORE,
    LocationError,
    by_token_budget,
    encode_prompt,
    fill,
    pad_rows,
    with_leading_space,
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("atlas")


TEXTS = [
    ("{} is here", "Vera Jardez", "{}"),
    ("{}", "Vera Jardez", "The cat sat. {}"),
    ("They say {}, the city, is", "Côte 42!", "{}"),
    ("{}'s tongue is", "Łódź", "Because. {}"),
    ("Here {} is", "東京タワー", "{}"),
    ("Here {} is", "🎉 party", "I know. {}"),
    ("Here is {}.", "O'Neill & Sons, Inc.", "{}"),
]


@pytest.mark.parametrize(("prompt", "subject", "context"), TEXTS)
def test_the_subject_ends_where_its_last_token_ends(tokenizer, prompt, subject, context):
    row = encode_prompt(tokenizer, prompt, subject, context=context)
    until = tokenizer.decode(row.ids[: row.subject + 1])
    before = context.split("{}")[0] + prompt.split("{}")[0] + subject
    assert until.startswith(before)
    assert not tokenizer.decode(row.ids[: row.subject]).startswith(before)


@pytest.mark.parametrize(("prompt", "subject", "context"), TEXTS)
@pytest.mark.parametrize("target", ["Lisbon", " Lisbon", "New Zealand of old 17", "é"])
def test_the_labels_are_the_target(tokenizer, prompt, subject, context, target):
    row = encode_prompt(tokenizer, prompt, subject, context=context, target=target)
    whole = context.replace("{}", prompt.replace("{}", subject)) + with_leading_space(target)
    assert tokenizer.decode(list(row.labels)).strip() == target.strip()
    assert tokenizer.decode([*row.ids, row.labels[-1]]) == whole
    assert row.ids[len(row.ids) - len(row.labels) + 1 :] == list(row.labels[:-1])


def test_a_row_cut_at_the_subject_is_a_prefix(tokenizer):
    whole = encode_prompt(tokenizer, "{} is a", "Vera Jardez")
    cut = encode_prompt(tokenizer, "{} is a", "Vera Jardez", stop_at_subject=True)
    assert cut.ids == whole.ids[: whole.subject + 1]
    assert cut.subject == whole.subject == len(cut.ids) - 1


def test_blank_subject_and_target_are_refused(tokenizer):
    with pytest.raises(LocationError, match="subject"):
        encode_prompt(tokenizer, "{} is", " ")
    with pytest.raises(LocationError, match="target"):
        encode_prompt(tokenizer, "{} is", "Rome", target=" ")


def test_braces_in_a_subject_are_text():
    assert fill("a {} b", "{x}") == ("a {x} b", 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_keeps_every_index_at_its_token(tokenizer, side):
    texts = [("{} is", "Vera", "Rome"), ("The long mother tongue of {} is surely", "Vera Jardez", "ice hockey")]
    rows = [encode_prompt(tokenizer, p, s, target=t) for p, s, t in texts]
    batch = pad_rows(rows, 0, side)
    for r, row in enumerate(rows):
        assert int(batch.input_ids[r, batch.subject[r]]) == row.ids[row.subject]
        real = batch.label_ids[r] != IGNORE
        assert tuple(batch.label_ids[r, real].tolist()) == row.labels
        last = len(row.ids) - len(row.labels)
        expected = row.ids[last:]
        assert batch.input_ids[r, batch.label_columns[r, real]].tolist() == expected
        mask = batch.attention_mask[r].bool()
        assert batch.input_ids[r, mask].tolist() == row.ids
        assert batch.position_ids[r, mask].tolist() == list(range(len(row.ids)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_selecting_rows_is_padding_them_anew(tokenizer, side):
    rows = [encode_prompt(tokenizer, "x " * n + "{} is", "Vera", target="Rome") for n in (1, 9, 3)]
    chosen = pad_rows(rows, 0, side).select(torch.tensor([0, 2]))
    anew = pad_rows([rows[0], rows[2]], 0, side)
    for name, value in vars(anew).items():
        assert torch.equal(getattr(chosen, name), value), name


def test_token_budget_holds_and_loses_nothing():
    lengths = [5, 3, 9, 9, 1, 30, 2]
    batches = by_token_budget(lengths, 20)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 20 for b in batches)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b", "qwen2", "stories260K"])
def test_real_records_with_real_tokenizers(shared, name):
    folder = shared / "data" / ("models" if name == "stories260K" else "tokenizers") / name
    if name in ("gpt2", "gpt-neox-20b"):  # these folders hold the tokenizer file alone
        from transformers import PreTrainedTokenizerFast

        real = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    else:
        real = load_tokenizer(str(folder))
    records = json.loads((shared / "data/counterfact_250.json").read_text())
    records += json.loads((shared / "data/zsre_300.json").read_text())
    for number, record in enumerate(records):
        edit = parse_record(record, number, f"record {number}")
        row = encode_prompt(real, edit.prompt, edit.subject, context="It rained. {}", target=edit.target)
        assert real.decode(list(row.labels)).strip() == edit.target.strip()
        before = "It rained. " + edit.prompt.split("{}")[0] + edit.subject
        assert real.decode(row.ids[: row.subject + 1], skip_special_tokens=True).strip().startswith(before.strip())

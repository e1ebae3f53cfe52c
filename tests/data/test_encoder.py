"""Subjects and targets are found in the tokens of whole texts; padding changes no index."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pmet_lightning.data import encoder as module
from pmet_lightning.data.chat import ChatFrame
from pmet_lightning.data.datamodule import EditDataModule
from pmet_lightning.data.encoder import (
    LocationError,
    PromptEncoder,
    fill,
    load_tokenizer,
    offsets_by_decoding,
)
from pmet_lightning.data.fields import RecordError
from pmet_lightning.data.records import parse_record
from pmet_lightning.data.token_rows import IGNORE, TokenRow, by_token_budget, pad_rows
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("atlas")


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return PromptEncoder(tokenizer)


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
def test_the_subject_ends_where_its_last_token_ends(encoder, tokenizer, prompt, subject, context):
    row = encoder.encode(prompt, subject, context=context)
    until = tokenizer.decode(row.ids[: row.subject + 1])
    before = context.split("{}")[0] + prompt.split("{}")[0] + subject
    assert until.startswith(before)
    assert not tokenizer.decode(row.ids[: row.subject]).startswith(before)


@pytest.mark.parametrize(("prompt", "subject", "context"), TEXTS)
@pytest.mark.parametrize("target", ["Lisbon", " Lisbon", "New Zealand of old 17", "é"])
def test_the_labels_are_the_target(encoder, tokenizer, prompt, subject, context, target):
    row = encoder.encode(prompt, subject, context=context, target=target)
    whole = context.replace("{}", prompt.replace("{}", subject)) + " " + target.strip()
    assert tokenizer.decode(list(row.labels)).strip() == target.strip()
    assert tokenizer.decode([*row.ids, row.labels[-1]]) == whole
    assert row.ids[len(row.ids) - len(row.labels) + 1 :] == list(row.labels[:-1])


def test_a_row_cut_at_the_subject_is_a_prefix(encoder):
    whole = encoder.encode("{} is a", "Vera Jardez")
    cut = encoder.encode("{} is a", "Vera Jardez", stop_at_subject=True)
    assert cut.ids == whole.ids[: whole.subject + 1]
    assert cut.subject == whole.subject == len(cut.ids) - 1


def test_blank_subject_and_target_are_refused(encoder):
    with pytest.raises(LocationError, match="subject"):
        encoder.encode("{} is", " ")
    with pytest.raises(LocationError, match="target"):
        encoder.encode("{} is", "Rome", target=" ")


def test_braces_in_a_subject_are_text():
    assert fill("a {} b", "{x}") == ("a {x} b", 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_keeps_every_index_at_its_token(encoder, side):
    texts = [("{} is", "Vera", "Rome"), ("The long mother tongue of {} is surely", "Vera Jardez", "ice hockey")]
    rows = [encoder.encode(p, s, target=t) for p, s, t in texts]
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
def test_selecting_rows_is_padding_them_again(encoder, side):
    rows = [encoder.encode("x " * n + "{} is", "Vera", target="Rome") for n in (1, 9, 3)]
    chosen = pad_rows(rows, 0, side).select(torch.tensor([0, 2]))
    again = pad_rows([rows[0], rows[2]], 0, side)
    for name, value in vars(again).items():
        assert torch.equal(getattr(chosen, name), value), name


def test_token_budget_holds_and_loses_nothing():
    lengths = [5, 3, 9, 9, 1, 30, 2]
    batches = by_token_budget(lengths, 20)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 20 for b in batches)
    assert [len(batch) for batch in by_token_budget(lengths, 20, 2)] == [1, 2, 2, 2]
    assert len(batches) == 3


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] }}{% endfor %}"  # noqa: E501


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_start|>user\nIt rained. Where is Vera Jardez?<|im_end|>\n<|im_start|>assistant\nLisbon"),
        (INST, "[INST] It rained. Where is Vera Jardez? [/INST] Lisbon"),
    ],
)
def test_a_chat_template_goes_around_the_prompt(template, expected):
    tokenizer = load_tokenizer("atlas")
    tokenizer.chat_template = template
    encoder = PromptEncoder.of(tokenizer, chat=True)
    row = encoder.encode("Where is {}?", "Vera Jardez", context="It rained. {}", target="Lisbon")
    assert tokenizer.decode([*row.ids, row.labels[-1]]) == expected
    assert tokenizer.decode(list(row.labels)).strip() == "Lisbon"
    assert tokenizer.decode(row.ids[: row.subject + 1]).endswith("It rained. Where is Vera Jardez")
    assert encoder.fingerprint() != PromptEncoder.of(tokenizer).fingerprint()


def test_a_chat_needs_a_template(tokenizer):
    with pytest.raises(ValueError, match="chat template"):
        PromptEncoder.of(tokenizer, chat=True)
    silent = load_tokenizer("atlas")
    silent.chat_template = "hello"
    with pytest.raises(ValueError, match="hello"):
        PromptEncoder.of(silent, chat=True)


def test_a_real_chat_model_s_template(shared):
    tokenizer = load_tokenizer(str(shared / "data/tokenizers/qwen2"))
    row = PromptEncoder.of(tokenizer, chat=True).encode("Where is {}?", "Zürich 東京", target="New Zealand")
    asked = [{"role": "user", "content": "Where is Zürich 東京?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode([*row.ids, row.labels[-1]]) == text + "New Zealand"
    assert tokenizer.decode(row.ids[: row.subject + 1]).endswith("Where is Zürich 東京")


@pytest.mark.parametrize(("prompt", "subject", "context"), TEXTS)
def test_a_slow_tokenizer_locates_as_well(prompt, subject, context):
    """ByT5 reads bytes: every character outside ASCII is several tokens."""
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    row = PromptEncoder(slow).encode(prompt, subject, context=context, target="Łódź 42")
    before = context.split("{}")[0] + prompt.split("{}")[0] + subject
    assert slow.decode(row.ids[: row.subject + 1]) == before
    assert slow.decode(list(row.labels)) == " Łódź 42"


def test_a_tokenizer_that_changes_the_text_is_refused():
    class Lower(ByT5Tokenizer):
        def _tokenize(self, text):
            return super()._tokenize(text.lower())

    with pytest.raises(LocationError, match="slow tokenizer"):
        PromptEncoder(Lower()).encode("{} is", "Vera", target="Rome")


FILES = (
    "counterfact_250", "zsre_300", "known_facts_300", "knowedit_wiki_counterfact_60",
    "flat_paraphrases_100", "flat_generation_prompts_100",
)  # fmt: skip


@pytest.fixture(scope="module")
def triples(shared):
    """Prompt, subject and target of 1,110 real records."""
    found = []
    for name in FILES:
        for number, record in enumerate(json.loads((shared / f"data/{name}.json").read_text())):
            if "attribute" in record:
                record = {"prompt": record["prompt"], "subject": record["subject"], "target_new": record["attribute"]}
            edit = parse_record(record, number, f"{name}, record {number}")
            found.append((edit.prompt, edit.subject, edit.target))
    return found


def real_tokenizer(shared, name: str):
    folder = shared / "data" / ("models" if name == "stories260K" else "tokenizers") / name
    if name in ("gpt2", "gpt-neox-20b"):  # these folders hold the tokenizer file alone
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b", "qwen2", "stories260K"])
def test_real_records_with_real_tokenizers(shared, triples, name):
    real, refused = real_tokenizer(shared, name), Counter()
    encoder = PromptEncoder(real)
    for prompt, subject, target in triples:
        try:
            row = encoder.encode(prompt, subject, context="It rained. {}", target=target)
        except LocationError as error:
            refused[str(error).split(" in ")[0]] += 1
            continue
        assert real.decode(list(row.labels)).strip() == target.strip()
        before = ("It rained. " + prompt.split("{}")[0] + subject).strip()
        assert real.decode(row.ids[: row.subject + 1], skip_special_tokens=True).strip().startswith(before)
        assert not real.decode(row.ids[: row.subject], skip_special_tokens=True).strip().startswith(before)
    assert len(triples) == 1110
    print(f"{name}: {len(triples)} triples, refused {sum(refused.values())} {dict(refused)}")  # noqa: T201
    assert not refused, "each of these records has a subject and a target"


@pytest.mark.parametrize("name", ["gpt2", "stories260K"])
def test_offsets_by_decoding_are_those_of_the_fast_tokenizer(shared, triples, name):
    real = real_tokenizer(shared, name)
    for prompt, subject, target in triples[::4]:
        asked = fill(prompt, subject)[0]
        text = f"{asked} {target}"
        fast = real(text, return_offsets_mapping=True)
        places = []
        for offsets in (fast["offset_mapping"], offsets_by_decoding(real, text, fast["input_ids"])):
            last = len(prompt.split("{}")[0] + subject) - 1
            covering = [i for i, (start, end) in enumerate(offsets) if start <= last < end]
            places.append((covering[-1], next(i for i, (_, end) in enumerate(offsets) if end > len(asked))))
        assert places[0] == places[1], text


@pytest.mark.parametrize("chat", [None, ChatFrame("[user] ", " [model]", " ")])
@pytest.mark.parametrize("slow", [False, True])
def test_texts_together_and_one_by_one(chat, slow):
    encoder = PromptEncoder(ByT5Tokenizer() if slow else load_tokenizer("atlas"), chat)
    prompts = ["Vera Jardez is", "Zürich {} lies in", "x", "Vera Jardez is"]
    targets = ["Łódź 42", None, " New Zealand", None]
    pairs = list(zip(prompts, targets, strict=True))
    assert encoder.encode_all(prompts, targets) == [encoder.encode(p, target=t) for p, t in pairs]
    assert encoder.encode_all(prompts) == [encoder.encode(p) for p in prompts]
    assert encoder.encode_all([]) == []
    with pytest.raises(LocationError, match="tokenises to nothing"):
        encoder.encode_all(prompts[:1], [" "])


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_against_one_row_at_a_time(side):
    rows = [TokenRow([5, 6, 7, 8], 1, (8, 9)), TokenRow([4]), TokenRow([3, 2], 0, (1,)), TokenRow([1, 2, 3], -1, ())]
    batch = pad_rows(rows, 99, side)
    for r, row in enumerate(rows):
        first, count = (4 - len(row.ids) if side == "left" else 0), len(row.ids)
        real = slice(first, first + count)
        assert batch.input_ids[r, real].tolist() == row.ids
        assert batch.attention_mask[r, real].tolist() == [1] * count
        assert batch.position_ids[r, real].tolist() == list(range(count))
        assert int(batch.attention_mask[r].sum()) == count
        assert int((batch.input_ids[r] == 99).sum()) == 4 - count
        assert int(batch.subject[r]) == first + row.subject
        known = len(row.labels)
        assert batch.label_ids[r].tolist() == [*row.labels, *[IGNORE] * (2 - known)]
        expected = [first + count - known + k if k < known else first + count - 1 for k in range(2)]
        assert batch.label_columns[r].tolist() == expected


def test_a_text_is_tokenised_once(tokenizer, monkeypatch):
    asked: list[str] = []
    original = module.tokenize

    def counted(tokenizer, texts, *, special):
        asked.extend(texts)
        return original(tokenizer, texts, special=special)

    monkeypatch.setattr(module, "tokenize", counted)
    encoder = PromptEncoder(tokenizer)
    rows = encoder.encode_all(["a river", "a lake", "a river"])
    assert rows[0] == rows[2] == encoder.encode("a river")
    assert asked == ["a river", "a lake"]
    monkeypatch.setattr(module, "MOST_KEPT_TEXTS", 2)
    assert encoder.encode_all(["a lake", "a hill"])[0] == rows[1]
    assert asked == ["a river", "a lake", "a hill"]
    encoder.encode("a river")  # the oldest is gone
    assert asked[3:] == ["a river"]


@pytest.mark.parametrize("dropped", [("tokenizer.json", "tokenizer_config.json"), ("tokenizer.json",)])
@pytest.mark.parametrize("family", ["gptj", "llama", "gemma", "qwen2", "bloom", "gpt_neox"])
def test_a_folder_without_a_tokenizer_says_so(tmp_path, family, dropped):
    folder = save_tiny(family, tmp_path / "model")
    load_tokenizer(folder)
    for name in dropped:
        (tmp_path / "model" / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*model.*expected tokenizer\.json"):
        load_tokenizer(folder)


def test_a_tokenizer_of_bytes_needs_no_files(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("ab")["input_ids"]


@pytest.mark.parametrize("text", ["\ud83d is", "Vera \udc00"])
def test_half_a_character_is_named(encoder, text):
    with pytest.raises(LocationError, match="half of a character .* at position [05]"):
        encoder.encode_all([text])


@pytest.mark.parametrize("field", ["prompt", "subject", "target_new", "rephrase_prompt", "locality_ground_truth"])
def test_a_record_with_half_a_character_is_named(tokenizer, tmp_path, field):
    record = {
        "prompt": "{} is in", "subject": "Vera", "target_new": "Rome", "rephrase_prompt": "Where is Vera? In",
        "locality_prompt": "Ada is in", "locality_ground_truth": "Oslo",
    }  # fmt: skip
    (tmp_path / "facts.json").write_text(
        json.dumps([record | {"subject": "Tora"}, record | {field: record[field] + " \ud83d"}])
    )
    data = EditDataModule(str(tmp_path / "facts.json"))
    data.attach(tokenizer)
    with pytest.raises(RecordError, match="facts.json, record 1: .* holds half of a character"):
        data.setup("fit")

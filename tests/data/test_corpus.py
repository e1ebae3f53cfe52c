"""General text: from a CSV file it is read as the records are; its special tokens."""

from __future__ import annotations

import pytest

from pmet_lightning.data.corpus import CorpusError, corpus_texts, pack_rows
from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.utils.resources import locate


def write(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_texts_of_a_csv_corpus_are_text(tmp_path):
    """No type is guessed, an empty cell is no text, and nothing is read as JSON."""
    path = write(tmp_path, '\ufeffid, text \n1,1.10\n2,NA\n3,\n4,"[""a"", 1]"\n5\n6," two\nlines "\n7,true\n')
    assert sorted(corpus_texts(path)) == sorted(["1.10", "NA", '["a", 1]', "two\nlines", "true"])


def test_the_order_of_a_csv_corpus_is_that_of_plain_text(tmp_path):
    lines = [f"text {i}" for i in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    path = write(tmp_path, "\n".join(["text", *lines]))
    found = list(corpus_texts(path, seed=3))
    assert found == list(corpus_texts(str(tmp_path / "a.txt"), seed=3)) != lines
    assert sorted(found) == sorted(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("body\none\n", r"a\.csv: expected a column 'text', found body"),
        ("text\none\ntwo,three\n", r"a\.csv, line 3: 2 cells, expected at most 1"),
        ('text\n"one\n', r"a\.csv, line 2: cannot be read as csv"),
        (b"text\none\nM\xfcnchen\n", r"a\.csv, line 3: expected UTF-8 text, found the byte 0xfc"),
    ],
)
def test_a_broken_csv_corpus_names_its_line(tmp_path, content, message):
    with pytest.raises(CorpusError, match=message):
        list(corpus_texts(write(tmp_path, content)))


@pytest.fixture
def tokenizer():
    made = load_tokenizer(locate("atlas"))
    made.add_special_tokens({"unk_token": "<unk>", "additional_special_tokens": ["<turn>"]})
    return made


def packed(tokenizer, *texts):
    return [id_ for row in pack_rows(texts, tokenizer, 1000) for id_ in row.ids]


def test_an_unknown_token_that_a_text_spells_is_text(tokenizer):
    """WikiText's rare words; in texts without them special tokens are what they are."""
    text, chat = "The <unk> of Arvenport", "<turn>Where?<turn>In Arvenport"
    ids = packed(tokenizer, text, chat, text)
    assert tokenizer.unk_token_id in tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<turn>")) == 2
    assert tokenizer.decode(ids).count("<unk>") == 2
    assert packed(tokenizer, text, chat, text) == ids, "the tokenizer is as before"
    assert tokenizer.unk_token_id in tokenizer(text)["input_ids"]


@pytest.mark.parametrize("role", ["bos_token", "eos_token"])
def test_a_token_that_separates_texts_stays_one(tokenizer, role):
    """GPT-2's unknown token is its separator."""
    setattr(tokenizer, role, "<unk>")
    assert packed(tokenizer, "one<unk> two").count(tokenizer.unk_token_id) == 1


def test_text_that_holds_no_unknown_token_is_read_once(tokenizer, monkeypatch):
    calls = []
    read = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda *given, **options: calls.append(1) or read(*given, **options)
    )
    packed(tokenizer, "Rain fell on Arvenport.", "It was late.")
    once = len(calls)
    calls.clear()
    packed(tokenizer, "Rain fell on Arvenport.", "It was <unk>.")
    assert len(calls) == once + 1


def test_an_unknown_token_of_a_real_tokenizer(shared):
    real = load_tokenizer(str(shared / "data/models/stories260K"))
    assert real.unk_token_id in real("a <unk> b")["input_ids"]
    assert real.unk_token_id not in packed(real, "a <unk> b")

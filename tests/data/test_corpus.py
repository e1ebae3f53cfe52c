"""General text from a CSV file: read as the records are."""

from __future__ import annotations

import pytest

from pmet_lightning.data.corpus import CorpusError, corpus_texts


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

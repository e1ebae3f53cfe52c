"""Facts as programs hold them: tables, columns and rows give the edits that records give."""

from __future__ import annotations

import dataclasses
from collections import namedtuple

import datasets
import numpy as np
import pyarrow as pa
import pytest

from pmet_lightning.data.fields import RecordError
from pmet_lightning.data.readers import as_edits
from pmet_lightning.data.records import Edit

RECORDS = [
    {"prompt": "{} lies in", "subject": "Vera", "target_new": "1990", "ground_truth": "1991", "rephrase_prompt": "a b"},
    {"prompt": "{} is a", "subject": "Tora", "target_new": "poet", "relation": "P1"},
    {"prompt": "{} was", "subject": "Ada", "target_new": "0228"},
]
NAMES = list(dict.fromkeys(name for record in RECORDS for name in record))
COLUMNS = {name: [record.get(name) for record in RECORDS] for name in NAMES}


def read(facts):
    return [dataclasses.replace(edit, origin="") for edit in as_edits(facts)]


Row = namedtuple("Row", NAMES)
Fact = dataclasses.make_dataclass("Fact", NAMES)
KINDS = {
    "records": lambda: RECORDS,
    "tuple": lambda: tuple(RECORDS),
    "generator": lambda: (record for record in RECORDS),
    "columns": lambda: COLUMNS,
    "arrays": lambda: {name: np.array(column, dtype=object) for name, column in COLUMNS.items()},
    "named tuples": lambda: [Row(**{name: record.get(name) for name in NAMES}) for record in RECORDS],
    "dataclasses": lambda: [Fact(**{name: record.get(name) for name in NAMES}) for record in RECORDS],
    "arrow": lambda: pa.table(COLUMNS),
    "datasets": lambda: datasets.Dataset.from_dict(COLUMNS),
    "stream": lambda: datasets.Dataset.from_dict(COLUMNS).to_iterable_dataset(),
    "edits": lambda: as_edits(RECORDS),
    "NaN": lambda: [{name: record.get(name, float("nan")) for name in NAMES} for record in RECORDS],
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_form_gives_the_same_edits(kind):
    assert read(KINDS[kind]()) == [dataclasses.replace(edit, origin="") for edit in as_edits(RECORDS)]


@pytest.mark.parametrize("rows", [False, True])
def test_tables_of_pandas(rows):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(COLUMNS)
    assert read([row for _, row in frame.iterrows()] if rows else frame) == read(RECORDS)
    assert list(frame.columns) == NAMES


def test_numbers_of_pandas_are_as_they_were_written():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "prompt": ["{} was born in"] * 3,
            "subject": ["Vera", "Tora", "Ada"],
            "target_new": [1990, 1985, 7],
            "ground_truth": [1991, None, pandas.NA],
            "case_id": [1.5, 2.0, float("nan")],
        }
    )
    found = read(frame)
    assert [edit.target for edit in found] == ["1990", "1985", "7"]
    assert [edit.target_true for edit in found] == ["1991", None, None]
    assert [edit.case_id for edit in found] == ["1.5", "2.0", "2"]


def test_numbers_of_numpy_are_plain():
    record = {"prompt": "{} was born in", "subject": "Vera", "target_new": np.int64(1990)}
    assert read(record)[0].target == "1990"


def test_one_record_and_one_edit():
    assert read(RECORDS[0]) == read(RECORDS[:1])
    assert read(Edit("0", "{} is", "Vera", "here"))[0].subject == "Vera"


def test_what_is_the_same_for_all_facts_is_given_once():
    found = read({"prompt": "{} lies in", "subject": ["Vera", "Tora"], "target_new": ["Rome", "Oslo"]})
    assert [(edit.prompt, edit.target) for edit in found] == [("{} lies in", "Rome"), ("{} lies in", "Oslo")]


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(RecordError, match=r"different lengths \(\{'subject': 2, 'target_new': 1\}\)"):
        read({"prompt": "{} lies in", "subject": ["Vera", "Tora"], "target_new": ["Rome"]})


@pytest.mark.parametrize("facts", [7, None, object()])
def test_anything_else_is_named(facts):
    with pytest.raises(RecordError, match=f"got {type(facts).__name__}, expected records"):
        read(facts)


def test_frames_with_odd_columns():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(COLUMNS)
    numbered = pandas.concat([frame, pandas.DataFrame({0: [1, None, 2]})], axis=1)
    assert read(numbered) == read(RECORDS)
    with pytest.raises(RecordError, match=r"facts\[0\]: no field 'subject'; found 0, 1"):
        as_edits(pandas.DataFrame([["x", "y"], ["z", None]]))
    with pytest.raises(RecordError, match="facts: several columns are named 'prompt'"):
        as_edits(pandas.concat([frame, frame[["prompt"]]], axis=1))

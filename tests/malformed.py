"""Malformed inputs, made with a seed from good files of every format, and good files to make them from."""

from __future__ import annotations

import copy
import csv
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

RECORDS = 5  # of a good file
Record = dict[str, Any]


def counterfact(i: int) -> Record:
    return {
        "case_id": i,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is", "subject": f"Person {i}", "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"}, "target_true": {"str": "French", "id": "Q150"},
        },
        "paraphrase_prompts": [f"Person {i} was born. Person {i} speaks"],
        "neighborhood_prompts": ["Ada speaks", "Bob speaks"],
        "generation_prompts": [f"Person {i} lives"],
    }  # fmt: skip


def mquake(i: int) -> Record:
    rewrites = [counterfact(i)["requested_rewrite"], {**counterfact(i)["requested_rewrite"], "subject": f"Town {i}"}]
    questions = {"questions": [f"What does Person {i} speak?"], "new_answer": "English", "new_answer_alias": ["Engl."]}
    return {"case_id": i, "requested_rewrite": rewrites, **questions}


def zsre(i: int) -> Record:
    return {
        "subject": f"Person {i}", "src": f"What does Person {i} speak?", "rephrase": f"Which tongue has Person {i}?",
        "answers": ["English"], "alt": "French", "loc": "nq question: who wrote it", "loc_ans": "nobody",
    }  # fmt: skip


def flat(i: int) -> Record:
    return {"prompt": "{} speaks", "subject": f"Person {i}", "target_new": "English", "ground_truth": "French"}


def knowedit(i: int) -> Record:
    hop = [{"prompt": f"Person {i}, it is known, speaks", "ground_truth": [["English", "Engl."]]}]
    return {**flat(i), "portability": {"Reasoning": hop}, "locality": {"Relation": copy.deepcopy(hop)}}


def qaedit(i: int) -> Record:
    asked = {"locality": [{"loc": "who rules Oz", "loc_ans": "Tip"}], "rephrase": f"What tongue has Person {i}?"}
    return {"id": i, "prompt": f"what does Person {i} speak?", "target": "English", "subject": f"Person {i}", **asked}


def wikibigedit(i: int) -> Record:
    return {
        "tag": "update", "subject": f"Person {i}", "relation": "tongue", "update": f"What does Person {i} speak?",
        "object": "English", "ans": "English", "rephrase": f"What tongue has Person {i}?", "loc": "who rules Oz?",
        "personas": f"Arr, what speaks Person {i}?", "mhop": "Where is it spoken?", "mhop_ans": "Oz", "loc_ans": "Tip",
    }  # fmt: skip


FORMATS: dict[str, Callable[[int], Record]] = {
    f.__name__: f for f in (counterfact, mquake, zsre, flat, knowedit, qaedit, wikibigedit)
}
PROMPT = {"zsre": "src", "wikibigedit": "update"}
TARGET = {"qaedit": "target", "wikibigedit": "ans"}
FLATS = ("flat", "knowedit", "qaedit", "wikibigedit")


def fact_of(record: Record) -> Record:
    """The mapping that holds the fact of a record: its own fields, or those of a rewrite."""
    rewrite = record.get("requested_rewrite", record)
    return rewrite[-1] if isinstance(rewrite, list) else rewrite


def good(name: str) -> list[Record]:
    return [FORMATS[name](i) for i in range(RECORDS)]


def to_bytes(records: list[Any], container: str) -> bytes:
    """A file of some records; a cell of CSV that is no text is JSON."""
    if container == "json":
        return json.dumps(records, indent=1).encode()
    if container == "jsonl":
        return "".join(json.dumps(record) + "\n" for record in records).encode()
    names = list(dict.fromkeys(name for record in records for name in record))
    if container == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.table({name: [record.get(name) for record in records] for name in names}), sink)
        return sink.getvalue()
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    for record in records:
        cells = (record.get(name) for name in names)
        writer.writerow(["" if c is None else c if isinstance(c, str) else json.dumps(c) for c in cells])
    return text.getvalue().encode()


@dataclass(frozen=True)
class Malformed:
    """An input that must be refused.

    Attributes:
        kind: What is wrong with it.
        file: Name of the file.
        content: What is in it; ``None`` where there is no such file.
        where: What the message must say of the place inside the file.
    """

    kind: str
    file: str
    content: bytes | None
    where: str = ""

    def write(self, folder: Path) -> Path:
        path = folder / self.file
        if self.content is not None:
            path.write_bytes(self.content)
        return path


@dataclass(frozen=True)
class RecordFault:
    """A fault of one record: where it can be, and what makes it."""

    make: Callable[[Record, str, random.Random], Any]
    formats: tuple[str, ...] = tuple(FORMATS)
    containers: tuple[str, ...] = ("json", "jsonl")


def _field(names: dict[str, str], default: str, *values: Any, drop: bool = False, **where: Any) -> RecordFault:
    """One field of a fact takes one of some values, or is dropped."""

    def make(record: Record, name: str, rng: random.Random) -> Record:
        fact = fact_of(record)
        if drop:
            del fact[names.get(name, default)]
        else:
            fact[names.get(name, default)] = copy.deepcopy(rng.choice(values))
        return record

    return RecordFault(make, **where)


def _top(name: str, *values: Any, **where: Any) -> RecordFault:
    """One field of a record takes one of some values."""
    return RecordFault(lambda record, _, rng: {**record, name: copy.deepcopy(rng.choice(values))}, **where)


def _whole(values: tuple[Any, ...], **where: Any) -> RecordFault:
    """A record is another value altogether."""
    return RecordFault(lambda record, name, rng: copy.deepcopy(rng.choice(values)), **where)


EVERYWHERE = {"containers": ("json", "jsonl", "csv", "parquet"), "formats": ("zsre", *FLATS)}
TARGETED = tuple(name for name in FORMATS if name != "zsre")
NAN, INF = float("nan"), float("inf")
SURROGATES = ("\ud83d", "x\udc00", "In {} \ud800")
_BLANK = ("", "  ", "\t\n", "\u3000", "\u00a0 ", "\u200b", "\ufeff", "\u2060 ")
_NO_TEXT = ([], {}, True, ["x", "y"], {"text": "x"}, [["x"]], INF, -INF, {"str": None}, {"str": NAN}, {"str": ["x"]})
_NO_QUESTION = ({"prompt": "x"}, True, [True], [["x"]], [{"x": "y"}], INF, [INF], ["x", {"str": "y"}])
_NO_NAME = (["x"], {"str": "x"}, True, [], INF)
_NO_GROUPS = (
    "x", 5, ["x"], {"R": "x"}, {"R": ["x"]}, {"R": [{"prompt": "x"}]},
    {"R": [{"prompt": "{} is", "ground_truth": "x"}]}, [{"loc": "x"}],
    [{"loc": {"x": "y"}, "loc_ans": "y"}], {"R": [{"prompt": "x", "ground_truth": [[INF]]}]},
)  # fmt: skip
RECORD_FAULTS: dict[str, RecordFault] = {
    "no subject": _field({}, "subject", drop=True),
    "no prompt": _field(PROMPT, "prompt", drop=True, formats=tuple(name for name in FORMATS if name != "zsre")),
    "no target": _field(TARGET, "target_new", drop=True, formats=TARGETED),
    "a blank subject": _field({}, "subject", *_BLANK, **EVERYWHERE),
    "a blank prompt": _field(PROMPT, "prompt", *_BLANK[1:], **EVERYWHERE),
    "a blank target": _field(TARGET, "target_new", *_BLANK[1:], formats=TARGETED),
    "a missing subject": _field({}, "subject", None, **EVERYWHERE),
    "a missing target": _field(TARGET, "target_new", None, NAN, formats=TARGETED),
    "a subject that is no text": _field({}, "subject", *_NO_TEXT),
    "a prompt that is no text": _field(PROMPT, "prompt", *_NO_TEXT),
    "a target that is no text": _field(TARGET, "target_new", *_NO_TEXT, formats=TARGETED),
    "an old object that is no text": _field(
        {"counterfact": "target_true", "mquake": "target_true"}, "ground_truth", ["x", "y"], True, [["x"]], INF, [INF],
        {"str": ["x"]}, {"text": "x"}, formats=TARGETED,
    ),
    "two places": _field(PROMPT, "prompt", "{} and {} speak", "{}{}", **EVERYWHERE),
    "no place": _field(PROMPT, "prompt", "This one speaks", "{0} speaks", "{ } is", "{subject} is", **EVERYWHERE),
    "a subject in another case": _field(PROMPT, "prompt", "what does PERSON 0 say", "person  1 speaks", **EVERYWHERE),
    "a subject inside a word": _field({}, "subject", "Perso", "eaks", "hat", formats=("qaedit", "wikibigedit", "zsre")),
    "half a character": _field({}, "subject", *SURROGATES),
    "half a character in the prompt": _field(PROMPT, "prompt", "{} \udfff", "\ud800 {}"),
    "half a character in the target": _field(TARGET, "target_new", *SURROGATES, formats=TARGETED),
    "half a character in a question": _top("rephrase", "In \ud83d", ["x", "\udc00"], formats=("zsre", *FLATS)),
    "no mapping": _whole(("text", 5, True)),
    "a list for a mapping": _whole(([], ["x"], [{"prompt": "x"}]), containers=("json",)),  # a line of them is a file
    "nothing": _whole(({}, None, {"prompt": None}, {"x": "y"})),
    "a case number that is no name": _top("case_id", *_NO_NAME),
    "a relation that is no name": _top("relation", *_NO_NAME, formats=FLATS),
    "a rewrite that is none": _top("requested_rewrite", "x", 5, [], ["x"], True, formats=("counterfact", "mquake")),
    "a paraphrase that is no text": _top("paraphrase_prompts", *_NO_QUESTION, formats=("counterfact",)),
    "a neighbor that is no text": _top("neighborhood_prompts", *_NO_QUESTION, ["{} is"], formats=("counterfact",)),
    "a beginning that is no text": _top("generation_prompts", *_NO_QUESTION, formats=("counterfact",)),
    "a rephrasing that is no text": _top("rephrase", *_NO_QUESTION, formats=("zsre", *FLATS)),
    "a persona that is no text": _top("personas", *_NO_QUESTION, formats=FLATS),
    "a chain that is no text": _top("questions", *_NO_QUESTION, formats=("mquake",)),
    "a chain without an answer": _top("new_answer", None, "", NAN, formats=("mquake",)),
    "a chain's answer that is no text": _top("new_answer", ["x"], True, INF, {"text": "x"}, "  ", formats=("mquake",)),
    "a form that is no text": _top("new_answer_alias", {"x": "y"}, [True], [INF], [["x"]], formats=("mquake",)),
    "no answers": _top("answers", [], None, {}, 5, "x", {"str": "x"}, formats=("zsre",)),
    "answers that are no text": _top("answers", [None], [True], [["x"]], [{}], [NAN], [INF], [" "], formats=("zsre",)),
    "a question without its answer": _top("loc_ans", None, ["x", "y"], formats=("zsre", "wikibigedit")),
    "an answer that is no text": _top("loc_ans", {"x": "y"}, True, INF, [["x"]], formats=("zsre", "wikibigedit")),
    "a question about another subject": _top("loc", "{} is", "Does {} rule?", formats=("zsre", "wikibigedit")),
    "a hop without its answer": _top("mhop_ans", None, ["x", "y"], True, formats=("wikibigedit",)),
    "portability without questions": _top("portability", *_NO_GROUPS, formats=FLATS),
    "locality without questions": _top("locality", *_NO_GROUPS, formats=FLATS),
    "fewer answers than questions": RecordFault(
        lambda record, _, rng: {
            **record, "locality_prompt": ["x", "y", "z"], "locality_ground_truth": ["w"] * rng.randrange(3)
        },
        formats=FLATS,
    ),
}  # fmt: skip


def _with_record_fault(kind: str, rng: random.Random) -> Malformed:
    fault = RECORD_FAULTS[kind]
    name = rng.choice(fault.formats)
    # A table in which one cell is a number or a list would not be one: those are in the containers of the fault.
    container = rng.choice([c for c in fault.containers if c != "parquet" or name != "knowedit"])
    at, records = rng.randrange(RECORDS), good(name)
    records[at] = fault.make(records[at], name, rng)
    return Malformed(kind, f"{name}.{container}", to_bytes(records, container), f", record {at}")


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) // 3, len(data) - 8)]


def _line(rng: random.Random, *lines: bytes) -> tuple[bytes, str]:
    """Lines of good records with a bad one among them."""
    at = rng.randrange(RECORDS)
    rows = to_bytes(good("flat"), "jsonl").splitlines()
    rows[at] = rng.choice(lines)
    return b"\n".join(rows), f", line {at + 1}"


def _list_of(rng: random.Random, *items: bytes) -> tuple[bytes, str]:
    """A JSON list of good records, one a line, with a bad one among them."""
    body, where = _line(rng, *items)
    return b"[" + body.replace(b"\n", b",\n") + b"]", where


def _table_line(rng: random.Random, *lines: bytes) -> tuple[bytes, str]:
    rows = to_bytes(good("flat"), "csv").splitlines()
    rows.insert(at := rng.randrange(1, RECORDS), rng.choice(lines))
    return b"\n".join(rows), f", line {at + 1}"


def _table(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
BROKEN = (b'{"prompt": "{} is", ', b"{'prompt': 'x'}", b'{"prompt": "x",}', b"nonsense", b'{"a" "b"}', b'{"a": "b}')
DEEP = b'{"a": ' * 200_000
DIGITS = b'{"prompt": ' + b"7" * 5000 + b"}"
LATIN = b'{"prompt": "M\xfcnchen"}'
# File name, and what makes the content, perhaps with the place that the message must name.
FILE_FAULTS: dict[str, tuple[tuple[str, ...], Callable[[str, random.Random], Any]]] = {
    "an empty file": (("a.json", "a.jsonl", "a.csv", "a.parquet"), lambda _, rng: b""),
    "blank": (("a.json", "a.jsonl", "a.csv"), lambda _, rng: rng.choice([b"\n\n", b"  ", b"\xef\xbb\xbf", b"\r\n"])),
    "no record": (("a.json", "a.jsonl"), lambda _, rng: b"[]"),
    "a header alone": (("a.csv",), lambda _, rng: rng.choice([b"prompt,subject,target_new", b"prompt\r\n\r\n"])),
    "a broken line": (("a.jsonl", "a.json"), lambda _, rng: _line(rng, *BROKEN)),
    "a broken list": (("a.json",), lambda _, rng: _list_of(rng, *BROKEN[1:5])),
    "too deep": (("a.jsonl", "a.json"), lambda _, rng: _line(rng, DEEP, DEEP[:-9])),
    "a list too deep": (("a.json",), lambda _, rng: b"[" + rng.choice([DEEP, b"[" * 200_000])),
    "too many digits": (("a.jsonl",), lambda _, rng: _line(rng, DIGITS)),
    "a list of too many digits": (("a.json",), lambda _, rng: _list_of(rng, DIGITS)[0]),
    "Latin-1": (("a.jsonl",), lambda _, rng: _line(rng, LATIN)),
    "Latin-1 in a list": (("a.json",), lambda _, rng: _list_of(rng, LATIN)),
    "Latin-1 in a table": (("a.csv",), lambda _, rng: _table_line(rng, b"M\xfcnchen is,x,y")),
    "UTF-16": (
        ("a.json", "a.jsonl", "a.csv"),
        lambda name, rng: to_bytes(good("flat"), name.split(".")[1]).decode().encode(rng.choice(["utf-16", "utf-32"])),
    ),
    "an end that is cut off": (
        ("a.json", "a.parquet"), lambda name, rng: _cut(to_bytes(good("flat"), name.split(".")[1]), rng),
    ),
    "a pointer": (("a.json", "a.jsonl", "a.csv", "a.parquet"), lambda _, rng: LFS),
    "a page": (
        ("a.json", "a.jsonl", "a.csv", "a.parquet"),
        lambda _, rng: b"<!DOCTYPE html>\n<html><body>404: not found, sorry</body></html>\n",
    ),
    "compressed": (("a.json", "a.jsonl", "a.parquet"), lambda _, rng: b"\x1f\x8b\x08\x00" + rng.randbytes(200)),
    "zeros": (("a.json", "a.jsonl", "a.parquet", "a.csv"), lambda _, rng: b"\0" * 512),
    "more cells than columns": (("a.csv",), lambda _, rng: _table_line(rng, b"x,y,z,v,w", b"{} is,a,b,c,d,e")),
    "an open quote": (("a.csv",), lambda _, rng: to_bytes(good("flat"), "csv") + b'"x,y,z\n'),
    "a quote inside a cell": (("a.csv",), lambda _, rng: _table_line(rng, b'"x"y,z,v', b'"a"b')),
    "other separators": (
        ("a.csv",),
        lambda _, rng: (to_bytes(good("flat"), "csv").replace(b",", rng.choice([b";", b"\t", b"|"])), "record 0"),
    ),
    "no header": (("a.csv",), lambda _, rng: (b"{} is,x,y\n{} was,y,z\n", "record 0")),
    "a column twice": (
        ("a.csv",),
        lambda _, rng: (b"prompt,subject,target_new,%b\n{},x,y,z" % rng.choice([b"target_new", b" subject"]), "line 1"),
    ),
    "a column without a name": (("a.csv",), lambda _, rng: (b"prompt,,target_new\n{} is,x,y\n", "record 0")),
    "a table of other things": (("a.parquet",), lambda _, rng: (_table(x=[1, 2], y=["a", "b"]), "record 0")),
    "a table without rows": (("a.parquet",), lambda _, rng: _table(prompt=pa.array([], pa.string()))),
    "a table of bytes": (
        ("a.parquet",), lambda _, rng: (_table(prompt=["{} is"], subject=[b"x"], target_new=["y"]), "record 0"),
    ),
    "a table of lists": (
        ("a.parquet",), lambda _, rng: (_table(prompt=["{} is"], subject=[["x"]], target_new=["y"]), "record 0"),
    ),
    "a contradiction": (
        ("a.json", "a.jsonl", "a.csv", "a.parquet"),
        lambda name, rng: (to_bytes([*good("flat"), {**flat(2), "target_new": "x"}], name.split(".")[1]), "record 5"),
    ),
    "no such file": (("a.json", "a.jsonl", "a.csv", "a.parquet"), lambda _, rng: None),
    "an unknown ending": (("a.txt", "a.xlsx", "a.json.gz", "a.tsv"), lambda _, rng: to_bytes(good("flat"), "json")),
}  # fmt: skip


ROWS = b"".join(json.dumps({"text": f"This is text {i}."}).encode() + b"\n" for i in range(4))
# Corpora: name of the file, its content, and the place that the message must name.
CORPORA: dict[str, tuple[str, bytes, str]] = {
    "empty lines": ("a.jsonl", b"", "empty"),
    "an empty text": ("a.txt", b"", "empty"),
    "an empty table": ("a.csv", b"", "empty"),
    "an empty column": ("a.parquet", b"", "empty"),
    "a number": ("a.jsonl", ROWS + b'{"text": 5}', "record 4"),
    "numbers": ("a.parquet", _table(text=[1, 2]), "record 0"),
    "a list": ("a.jsonl", b'{"text": ["x"]}', "record 0"),
    "a mapping": ("a.json", b'[{"text": {"a": 1}}]', "record 0"),
    "a missing text": ("a.jsonl", ROWS + b'{"text": null}', "record 4"),
    "a row without the column": ("a.jsonl", ROWS + b'{"body": "x"}', "record 4"),
    "another column": ("a.jsonl", b'{"body": "x"}', "found body"),
    "other columns": ("a.csv", b"a,b\n1,2\n", "found a, b"),
    "another column of a table": ("a.parquet", _table(a=[1]), "found a"),
    "a broken line": ("a.jsonl", ROWS + b'{"text": \n', "row 4"),
    "no lines of JSON": ("a.jsonl", b"nonsense", "row 0"),
    "Latin-1": ("a.jsonl", ROWS + b'{"text": "M\xfcnchen"}', "line 5"),
    "Latin-1 in plain text": ("a.txt", b"one\ntwo\nM\xfcnchen\n", "line 3"),
    "Latin-1 in a table": ("a.csv", b"text\nM\xfcnchen\n", "line 2"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "line 1"),
    "a pointer": ("a.parquet", LFS, "unreadable as parquet"),
    "a pointer to lines": ("a.jsonl", LFS, "unreadable as json"),
    "zeros": ("a.parquet", b"\0" * 100, "unreadable as parquet"),
    "compressed": ("a.txt", b"\x1f\x8b\x08\x00\xff", "line 1"),
    "more cells than columns": ("a.csv", b"text\nx,y\n", "line 2"),
    "two columns of texts": ("a.csv", b"text,text\nx,y\n", "line 1"),
    "too deep": ("a.jsonl", DEEP, "unreadable as json"),
}
# Configurations: content, and what the message must say.
CONFIGURATIONS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "settings by name"),
    "an open list": (b"model:\n  layers: [1, 2\n", "line 3"),
    "a tab": (b"model:\n\tlayers: [1]\n", "line 2"),
    "two colons": (b"model: a: b\n", "line 1"),
    "no text": (b"\x00\x01\xff", "not a text file"),
    "Latin-1": (b"# M\xfcnchen\nmodel: {}\n", "not a text file"),
    "a list": (b"- model\n- data\n", "found list"),
    "a text": (b"text\n", "found str"),
    "a pointer": (LFS, "found str"),
    "a misspelled setting": (b"model:\n  layesr: [1]\n", "did you mean model.layers?"),
    "a misspelled section": (b"modle:\n  layers: [1]\n", "did you mean model?"),
    "a value of another type": (b"model:\n  layers: five\n", "model.layers is five"),
    "a date": (b"model:\n  layers: 2020-01-01\n", "2020-01-01"),
    "no number": (b"model:\n  clamp: .nan\n", "model.clamp is NaN"),
    "too deep": (b"[" * 5000, "recursion"),
    "mappings too deep": (b"{a: " * 5000, "recursion"),
    "too many digits": (b"model:\n  clamp: " + b"7" * 5000, "digits"),
    "a section twice": (b"model:\n  layers: [1]\nmodel:\n  clamp: 1\n", "line 3"),
    "a setting twice": (b"model:\n  layers: [1]\n  layers: [2]\n", "line 3"),
    "a text for a section": (b"model: text\n", "model is 'text'"),
    "a list for a section": (b"model: [1]\n", "model is [1]"),
    "a number for a name": (b"1: 2\n", "no setting 1"),
    "a list for a name": (b"? [1, 2]\n: 3\n", "line 1"),
    "code": (b"model: !!python/object:os.system x\n", "line 1"),
    "an unknown anchor": (b"model: *x\n", "line 1"),
    "two documents": (b"model: {}\n---\ndata: {}\n", "line 2"),
}


def _with_file_fault(kind: str, rng: random.Random) -> Malformed:
    names, make = FILE_FAULTS[kind]
    name = rng.choice(names)
    made = make(name, rng)
    content, where = made if isinstance(made, tuple) else (made, "")
    return Malformed(kind, name, content, where)


KINDS = (*RECORD_FAULTS, *FILE_FAULTS)


def malformed(count: int, seed: int = 0) -> Iterator[Malformed]:
    """Files of edits that must be refused, of every kind in turn."""
    rng = random.Random(seed)
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        yield _with_record_fault(kind, rng) if kind in RECORD_FAULTS else _with_file_fault(kind, rng)

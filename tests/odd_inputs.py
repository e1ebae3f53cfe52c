"""Odd but good inputs, made from good files of every format: each says what its clean form says."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from tests.malformed import FLATS, FORMATS, PROMPT, TARGET, Record, fact_of, good, to_bytes

NAN = float("nan")


@dataclass(frozen=True)
class Odd:
    """An input that must be read as others are.

    Attributes:
        kind: What is odd.
        clean: Records that say the same.
        file: Name of the file; empty for objects.
        made: Its content, or the objects.
    """

    kind: str
    clean: list[Record]
    file: str
    made: Any

    def given(self, folder: Path) -> Any:
        """What is given to be read: the path of a file, or the objects."""
        if not self.file:
            return self.made
        (folder / self.file).write_bytes(self.made)
        return str(folder / self.file)


def _text(data: bytes, change: Callable[[str], str]) -> bytes:
    return change(data.decode()).encode()


BOM = b"\xef\xbb\xbf"
# Changes of a file's bytes: in which containers, and what they are.
BYTES: dict[str, tuple[tuple[str, ...], Callable[[bytes], bytes]]] = {
    "a byte order mark": (("json", "jsonl", "csv"), lambda data: BOM + data),
    "carriage returns": (("json", "jsonl"), lambda data: data.replace(b"\n", b"\r\n")),
    "line feeds alone": (("csv",), lambda data: data.replace(b"\r\n", b"\n")),
    "empty lines": (("jsonl",), lambda data: b"\n\n" + data.replace(b"\n", b"\n \n\n")),
    "empty rows": (("csv",), lambda data: data.replace(b"\r\n", b"\r\n\r\n")),
    "no end of the last line": (("jsonl", "csv"), lambda data: data.rstrip()),
    "white space around": (("json", "jsonl"), lambda data: b" \n\t" + data + b"\n\n  \n"),
    "a mark and carriage returns": (("json", "jsonl"), lambda data: BOM + data.replace(b"\n", b"\r\n")),
    "a list of lines": (("json",), lambda data: b"".join(json.dumps(r).encode() + b"\n" for r in json.loads(data))),
    "lines as a list": (("jsonl",), lambda data: b"[" + data.strip().replace(b"\n", b",\n") + b"]"),
    "escaped characters": (("json",), lambda data: _text(data, lambda text: text.replace("E", "\\u0045"))),
    "no indentation": (("json",), lambda data: json.dumps(json.loads(data), separators=(",", ":")).encode()),
    "fields in another order": (
        ("json",), lambda data: json.dumps([dict(reversed(record.items())) for record in json.loads(data)]).encode()
    ),
    "columns in another order": (
        ("csv",), lambda data: b"\r\n".join(b",".join(row.split(b",")[::-1]) for row in data.splitlines())
    ),
    "quoted cells": (
        ("csv",), lambda data: _text(data, lambda t: "\n".join(
            ",".join(f'"{cell}"' for cell in row.split(",")) for row in t.splitlines())),
    ),
    "empty columns": (("csv",), lambda data: data.replace(b"\r\n", b",,\r\n")),
    "blanks in the header": (("csv",), lambda data: b" , ".join(data.partition(b"\r\n")[0].split(b","))
                             + b" \r\n" + data.partition(b"\r\n")[2]),
}  # fmt: skip


def _fact(**changes: Callable[[str], Any]) -> Callable[[Record, str], Record]:
    """Changes of the fields of a fact, by the names that flat records have for them."""

    def change(record: Record, name: str) -> Record:
        fact = fact_of(record)
        others = {"prompt": PROMPT.get(name, "prompt"), "target_new": TARGET.get(name, "target_new")}
        for field, make in changes.items():
            own = others.get(field, field)
            if own in fact:
                fact[own] = make(fact[own])
        return record

    return change


def _with(**fields: Any) -> Callable[[Record, str], Record]:
    return lambda record, _: {**record, **fields}


def _spaced(value: Any) -> Any:
    return {**value, "str": f"\n{value['str']}\t"} if isinstance(value, dict) else f" {value}\u3000"


def _as_list(*names: str) -> Callable[[Record, str], Record]:
    """One question instead of a list of one, and the reverse."""

    def change(record: Record, _: str) -> Record:
        for name in names:
            value = record.get(name)
            if isinstance(value, str):
                record[name] = [value]
            elif isinstance(value, list) and len(value) == 1:
                record[name] = value[0]
        return record

    return change


# Changes of records, in all formats or some.
RECORDS: dict[str, tuple[tuple[str, ...], Callable[[Record, str], Record]]] = {
    "outer white space": (tuple(FORMATS), _fact(prompt=_spaced, subject=_spaced, target_new=_spaced)),
    "no-break spaces": (tuple(FORMATS), _fact(subject=lambda s: f"\u00a0{s}\u2009")),
    "other columns": (tuple(FORMATS), _with(note="x", weight=1.5, tags=["a", {"b": None}])),
    "missing values": (tuple(FORMATS), _with(id=None, note=None, split=NAN)),
    "a text for a mapping": (("counterfact", "mquake"), _fact(target_true=lambda value: value["str"])),
    "a mapping for a text": (FLATS, _fact(target_new=lambda value: {"str": value})),
    "one for a list": (tuple(FORMATS), _as_list("paraphrase_prompts", "rephrase", "questions", "loc", "loc_ans")),
    "lists in lists": (("knowedit",), lambda r, _: {**r, "portability": {"Reasoning": [
        {**q, "ground_truth": [[[*q["ground_truth"][0]][0]], q["ground_truth"][0][1:]]}
        for q in r["portability"]["Reasoning"]]}}),
    "no lists": (("qaedit",), lambda r, _: {**r, "locality": [
        {**q, "loc_ans": [q["loc_ans"]]} for q in r["locality"]]}),
    "blank questions": (("counterfact",), lambda r, _: {
        **r, "paraphrase_prompts": ["", *r["paraphrase_prompts"], None, NAN, "\u200b"]}),
    "empty groups": (FLATS, lambda r, _: {"portability": {"X": []}, "locality": {"Y": None}, **r}),
    "empty questions": (FLATS[:3], _with(personas=[], locality_prompt=[], locality_ground_truth=None)),
}  # fmt: skip


def _objects(records: list[Record]) -> dict[str, Any]:
    """The same facts as programs hold them."""
    names = list(records[0])
    columns = {name: [record[name] for record in records] for name in names}
    return {
        "tuple": tuple(records),
        "generator": (record for record in records),
        "columns": columns,
        "arrow": pa.table(columns),
        "data set": datasets.Dataset.from_list(records),
        "streamed data set": datasets.Dataset.from_list(records).to_iterable_dataset(),
        "NaN beside": [{**record, "note": NAN} for record in records],
    }


def _frames(records: list[Record]) -> dict[str, Any]:
    import pandas as pd

    frame = pd.DataFrame(records)
    return {
        "frame": frame,
        "frame with another index": frame.set_index(frame.index + 7),
        "frame of categories": frame.astype({"subject": "category"}),
        "frame of strings": frame.convert_dtypes(),
        "rows of a frame": [row for _, row in frame.iterrows()],
    }


def odd_inputs() -> Iterator[Odd]:
    """Odd inputs of every kind, in every format that it can be of."""
    for kind, (containers, change) in BYTES.items():
        for container in containers:
            for name in ("flat", "zsre") if container == "csv" else ("flat", "counterfact", "mquake"):
                if kind in ("columns in another order", "quoted cells") and name != "flat":
                    continue  # cells with commas
                yield Odd(kind, good(name), f"{name}.{container}", change(to_bytes(good(name), container)))
    for kind, (formats, alter) in RECORDS.items():
        for name in formats:
            records = [alter(record, name) for record in good(name)]
            yield Odd(kind, good(name), f"{name}.json", to_bytes(records, "json"))
    for name in ("flat", "qaedit", "wikibigedit"):
        for kind, made in {**_objects(good(name)), **_frames(good(name))}.items():
            yield Odd(kind, good(name), "", made)
    yield from _others()


def _others() -> Iterator[Odd]:
    """Numbers, forms of Unicode, endings."""
    named = [{**record, "prompt": f"S\u00e3o Tom\u00e9 {i} is", "subject": f"S\u00e3o Tom\u00e9 {i}"}
             for i, record in enumerate(good("flat"))]  # fmt: skip
    decomposed = [{**record, "prompt": unicodedata.normalize("NFD", record["prompt"])} for record in named]
    years = [{**record, "target_new": str(1990 + i), "ground_truth": "0"} for i, record in enumerate(good("flat"))]
    numbers = [{**record, "target_new": 1990 + i, "ground_truth": 0} for i, record in enumerate(good("flat"))]
    for container in ("json", "jsonl", "csv", "parquet"):
        yield Odd("a decomposed prompt", named, f"a.{container}", to_bytes(decomposed, container))
        yield Odd("numbers", years, f"a.{container}", to_bytes(numbers, container))
        yield Odd("an ending in capitals", good("flat"), f"a.{container.upper()}", to_bytes(good("flat"), container))
        if container != "csv":
            made = to_bytes(good("qaedit"), container)
            yield Odd("a name of several words", good("qaedit"), f"a (1) \u00e9.{container}", made)

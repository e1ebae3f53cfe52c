"""From a file or a hub data set to checked edits.

JSON and JSONL are parsed here, because only so can an error name the line; CSV, Parquet and the hub go
through the ``datasets`` library, and so does everything once it is read.
"""

from __future__ import annotations

import io
import json
import logging
import random
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pmet_lightning.data.fields import RecordError, find_misspelled
from pmet_lightning.data.records import Edit, check_no_contradictions, parse_records
from pmet_lightning.utils.resources import locate

log = logging.getLogger(__name__)

_POLL = 0.2  # seconds between two looks at the end of a growing file
# Wordings of COUNTERFACT's generation prompts that name no relation of a fact.
_OPENINGS = re.compile(
    r"twin city|is known for$|greatest (strength|accomplishment|artistic work)|surroundings include$|is my favorite"
    r"|is incredible at$|by navigating$|lunchtime|currently lives in$|passport that|restaurants|friends all speak"
    r"|passed away|parents are from|is sold by$|becomes important when$"
)


def read_edits(
    path: str | Sequence[str],
    *,
    split: str = "train",
    skip: int = 0,
    limit: int | None = None,
    shuffle: int | None = None,
) -> list[Edit]:
    """Read, check and return the edits of a file or a hub data set, or of several, one after the other.

    Args:
        path: A local ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file, a shipped name, or a hub name.
        split: Split of a hub data set.
        skip: Records left out at the beginning.
        limit: Most edits taken after that; all where ``None``.
        shuffle: Seed of a shuffle before that; the file's order where ``None``.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        RecordError: If the file is empty or broken, or a record taken from it is unusable.
    """
    edits, warned = [], set[str]()
    for number, origin, record in read_records(path, split=split, skip=skip, limit=limit, shuffle=shuffle):
        edits += parse_records(record, number, origin)
        _warn_of_names(record, origin, warned)
    check_no_contradictions(edits)
    _warn_of_generation_prompts(edits, path if isinstance(path, str) else ", ".join(path))
    return edits


def read_records(
    path: str | Sequence[str],
    *,
    split: str = "train",
    skip: int = 0,
    limit: int | None = None,
    shuffle: int | None = None,
) -> list[tuple[int, str, Any]]:
    """Records of any format, as they stand in the file: number, origin for messages, and the record.

    Args:
        path: As for :func:`read_edits`, and so are the others.
        split: Split of a hub data set.
        skip: Records left out at the beginning.
        limit: Most records taken after that; all where ``None``.
        shuffle: Seed of a shuffle before that; the file's order where ``None``.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        RecordError: If the file is empty or broken, or nothing is left of it.
    """
    paths = [path] if isinstance(path, str) else list(path)

    def everything() -> Iterator[tuple[str, Any]]:
        return chain.from_iterable(_records(locate(name), name, split) for name in paths)

    numbered: Iterable[tuple[int, tuple[str, Any]]] = enumerate(everything())
    if shuffle is not None:
        numbered = list(numbered)
        random.Random(shuffle).shuffle(numbered)
    taken = islice(numbered, skip, None if limit is None else skip + limit)
    records = [(number, origin, record) for number, (origin, record) in taken]
    if not records:
        count = sum(1 for _ in everything())
        raise RecordError(
            f"{', '.join(paths)}: no records to edit ({count} in the file, skip is {skip}, limit is {limit}); "
            "expected at least one"
        )
    return records


def as_edits(facts: Iterable[Mapping[str, Any] | Edit], name: str = "facts") -> list[Edit]:
    """Check and return edits that are at hand.

    Args:
        facts: Records as in a file (COUNTERFACT, zsRE or flat), edits, or some of each.
        name: What a message calls them: its fourth is "facts[3]".

    Raises:
        RecordError: If there is none, or one is unusable.
    """
    edits, warned = [], set[str]()
    for number, fact in enumerate(facts):
        origin = f"{name}[{number}]"
        if isinstance(fact, Edit):
            edits.append(replace(fact, origin=f"{origin} ({fact.origin})" if fact.origin else origin))
        else:
            edits += parse_records(fact, number, origin)
            _warn_of_names(fact, origin, warned)
    if not edits:
        raise RecordError(f"{name}: nothing to edit, expected at least one record")
    check_no_contradictions(edits)
    _warn_of_generation_prompts(edits, name)
    return edits


def stream_edits(
    path: str | Sequence[str], *, split: str = "train", skip: int = 0, limit: int | None = None, wait: float = 0.0
) -> Iterator[Edit]:
    """Edits one after the other, without ever holding more than one record; the end is where nothing comes any more.

    Args:
        path: As for :func:`read_edits`, but a local file has to be a ``.jsonl``.
        split: Split of a hub data set.
        skip: Records left out at the beginning.
        limit: Most records taken after that; all where ``None``.
        wait: Seconds to wait at the end of the last file for further lines, since the last one came.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        RecordError: If a record is unusable.
    """
    paths = [path] if isinstance(path, str) else list(path)
    records = chain.from_iterable(
        _streamed_records(locate(name), name, split, wait if name == paths[-1] else 0.0) for name in paths
    )
    warned = set[str]()
    for number, (origin, record) in islice(enumerate(records), skip, None if limit is None else skip + limit):
        edits = parse_records(record, number, origin)
        _warn_of_names(record, origin, warned)
        yield from edits


def _streamed_records(found: str, name: str, split: str, wait: float) -> Iterator[tuple[str, Any]]:
    if not Path(found).is_file():
        return _records(found, name, split)  # of the hub, or an error
    if Path(found).suffix.lower() != ".jsonl":
        raise RecordError(f"{name}: a stream reads one record a line; expected a .jsonl file or a hub data set")
    lines = enumerate(_growing_lines(Path(found), wait), start=1)
    return _json_lines((_as_text(line, name, number) for number, line in lines), name)


def _growing_lines(path: Path, wait: float) -> Iterator[bytes]:
    """The lines of a file that others may be writing to: one counts once it has its end, or nothing follows."""
    begun, since = b"", time.monotonic()
    with path.open("rb") as file:
        while True:
            while not (line := begun + file.readline()).endswith(b"\n") and time.monotonic() - since < wait:
                begun = line
                time.sleep(_POLL)
            begun, since = b"", time.monotonic()
            if not line:
                return
            yield line


def _warn_of_names(record: Any, origin: str, warned: set[str]) -> None:
    """Say once for a file that a field is ignored whose name is nearly a known one.

    Args:
        record: One of the file's.
        origin: File and record, for the message.
        warned: Files of which it was said.
    """
    file = re.split(r", record \d|\[\d", origin)[0]
    names = {} if file in warned else find_misspelled(record)
    if names:
        warned.add(file)
        log.warning(
            "%s: ignored: %s; rename, if that is meant", origin,
            ", ".join(f"the field {name!r} (there is {near!r})" for name, near in names.items()),
        )  # fmt: skip


def _warn_of_generation_prompts(edits: Sequence[Edit], path: str) -> None:
    """Say so when the paraphrases look like COUNTERFACT's openings for free text, which ask for something else.

    Flat re-publications often carry them in the field for paraphrases; scored as such they give a meaningless
    generalisation. About 5 % of true paraphrases have such a wording, and more than half of the openings.
    """
    paraphrases = [p.prompt.strip() for edit in edits for p in edit.probes if p.kind == "generalisation"]
    found = [text for text in paraphrases if _OPENINGS.search(text)]
    if len(paraphrases) >= 10 and len(found) > 0.2 * len(paraphrases):
        log.warning(
            "%s: %d of %d paraphrases look like openings for free text (COUNTERFACT's generation prompts), such as %r: "
            "they do not ask for the fact, and the generalisation says nothing; take the paraphrases from the native "
            "file", path, len(found), len(paraphrases), found[0],
        )  # fmt: skip


def _records(found: str, name: str, split: str) -> Iterator[tuple[str, Any]]:
    """Pairs of origin and record."""
    suffix = Path(found).suffix.lower()
    if not Path(found).is_file():
        if suffix in (".json", ".jsonl", ".csv", ".parquet") or Path(found).exists():
            raise FileNotFoundError(
                f"no edits file {name!r} (looked in {Path.cwd()}); set --data.path to a .json, .jsonl, .csv or "
                ".parquet file or to a data set on the hub"
            )
        yield from _numbered(_hub_rows(found, split), name)
    elif Path(found).stat().st_size == 0:
        raise RecordError(f"{name}: the file is empty; expected a JSON list, JSON lines, CSV or Parquet")
    elif suffix in (".json", ".jsonl"):
        yield from _json_records(found, name)
    elif suffix in (".csv", ".parquet"):
        yield from _numbered(_table_rows(found, suffix[1:], name), name)
    else:
        raise RecordError(f"{name}: unknown ending {suffix!r}; expected .json, .jsonl, .csv or .parquet")


def _numbered(rows: Any, name: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows):
        yield f"{name}, record {number}", row


def _json_records(found: str, name: str) -> Iterator[tuple[str, Any]]:
    """A JSON list, or one JSON value a line, whatever the ending says."""
    text = _as_text(Path(found).read_bytes(), name)
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise _broken_json(name, error.lineno, error) from error
        yield from _numbered(records, name)
    else:
        yield from _json_lines(io.StringIO(text, newline=None), name)  # splitlines would split texts too


def _as_text(data: bytes, name: str, first_line: int = 1) -> str:
    """Bytes of a file, from the beginning of a line on, as text without a byte order mark.

    Raises:
        RecordError: If they are not UTF-8; it names the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + error.object[: error.start].count(b"\n")
        raise RecordError(
            f"{name}, line {line}: expected UTF-8 text, found the byte 0x{error.object[error.start]:02x} "
            f"({error.reason}); save the file as UTF-8"
        ) from error


def _json_lines(lines: Iterable[str], name: str) -> Iterator[tuple[str, Any]]:
    """A record a line, whose number an error names; empty lines are none."""
    number = 0
    for line_number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise _broken_json(name, line_number, error) from error
            yield f"{name}, record {number} (line {line_number})", record
            number += 1


def _broken_json(name: str, line: int, error: json.JSONDecodeError) -> RecordError:
    return RecordError(
        f"{name}, line {line}: broken JSON ({error.msg}, column {error.colno}); expected a list of records or "
        "one record a line"
    )


def _table_rows(found: str, kind: str, name: str) -> Any:
    import datasets

    if kind == "csv":
        _as_text(Path(found).read_bytes(), name)
    try:
        reader = datasets.Dataset.from_csv if kind == "csv" else datasets.Dataset.from_parquet
        return reader(found)
    except Exception as error:  # pyarrow and pandas raise many kinds; all mean the file is not such a table
        raise RecordError(f"{name}: cannot be read as {kind}: {str(error).splitlines()[0]}") from error


def _hub_rows(name: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:
        raise FileNotFoundError(
            f"no edits file {name!r} here, and the hub data set of that name cannot be read "
            f"({str(error).splitlines()[0]}); set --data.path to a local file"
        ) from error

"""From a file or a hub data set to validated edits.

JSON and JSONL are parsed here, because only then can an error name the line; CSV goes through the standard library,
because every cell is text there; Parquet and the hub go through the ``datasets`` library.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pmet_lightning.data import earth
from pmet_lightning.data.fields import RecordError, find_misspelled, with_outer_space
from pmet_lightning.data.records import Edit, check_no_contradictions, parse_records
from pmet_lightning.utils.resources import locate

log = logging.getLogger(__name__)

_POLL = 0.2  # seconds between two reads at the end of a growing file
_SHOWN_FAULTS = 20
# Records that are built when they are read; a local file of such a name wins, as it does for shipped files.
_BUILT: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "earth-records": partial(earth.records, "reporting"),
    "earth-tuning": partial(earth.records, "tuning"),
}
# Phrasings of COUNTERFACT's generation prompts that name no relation of a fact.
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
    """Read and validate the edits of a file or a hub data set, or of several, one after the other.

    Args:
        path: A local ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file, a shipped name, or a hub name.
        split: Split of a hub data set.
        skip: Number of records to skip at the beginning.
        limit: Maximum number of records after that; all where ``None``.
        shuffle: Seed of a shuffle before ``skip`` and ``limit``; the file's order where ``None``.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        RecordError: If the file is empty or broken, or a record taken from it is unusable.
    """
    edits = _parse_all(read_records(path, split=split, skip=skip, limit=limit, shuffle=shuffle))
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
    """Records of any format, as stored in the file: number, origin for messages, and the record.

    Args:
        path: As for :func:`read_edits`.
        split: Split of a hub data set.
        skip: Number of records to skip at the beginning.
        limit: Maximum number of records after that; all where ``None``.
        shuffle: Seed of a shuffle before ``skip`` and ``limit``; the file's order where ``None``.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        RecordError: If the file is empty or broken, or nothing is left of it.
    """
    paths = [path] if isinstance(path, str) else list(path)

    def all_records() -> Iterator[tuple[str, Any]]:
        return chain.from_iterable(_records(locate(name), name, split) for name in paths)

    numbered: Iterable[tuple[int, tuple[str, Any]]] = enumerate(all_records())
    if shuffle is not None:
        numbered = list(numbered)
        random.Random(shuffle).shuffle(numbered)
    taken = islice(numbered, skip, None if limit is None else skip + limit)
    records = [(number, origin, record) for number, (origin, record) in taken]
    if not records:
        count = sum(1 for _ in all_records())
        raise RecordError(
            f"{', '.join(paths)}: no records to edit ({count} in the file, skip is {skip}, limit is {limit}); "
            "expected at least one"
        )
    return records


def as_edits(facts: Iterable[Mapping[str, Any] | Edit], name: str = "facts") -> list[Edit]:
    """Validate edits that are given as objects, and return them.

    Args:
        facts: Records as in a file (COUNTERFACT, zsRE or flat), edits, or a mixture of both.
        name: Their name in messages: the fourth is "facts[3]".

    Raises:
        RecordError: If there are none, or one is unusable.
    """
    edits = _parse_all((number, f"{name}[{number}]", fact) for number, fact in enumerate(facts))
    if not edits:
        raise RecordError(f"{name}: nothing to edit, expected at least one record")
    check_no_contradictions(edits)
    _warn_of_generation_prompts(edits, name)
    return edits


def _parse_all(records: Iterable[tuple[int, str, Any]]) -> list[Edit]:
    """Edits of records with their numbers and origins; edits among them stay, with that origin before their own.

    Raises:
        RecordError: If some are unusable; it names all of them, so that a file is mended in one go.
    """
    edits: list[Edit] = []
    faults: list[str] = []
    warned = set[tuple[str, str]]()
    for number, origin, record in records:
        if isinstance(record, Edit):
            edits.append(replace(record, origin=f"{origin} ({record.origin})" if record.origin else origin))
            continue
        try:
            parsed = parse_records(record, number, origin)
        except RecordError as error:
            faults.append(str(error))
        else:
            _warn_of_oddities(record, parsed, origin, warned)
            edits += parsed
    if len(faults) > 1:
        more = [f"and {len(faults) - _SHOWN_FAULTS} more"] * (len(faults) > _SHOWN_FAULTS)
        raise RecordError("\n".join([f"{len(faults)} records are unusable:", *faults[:_SHOWN_FAULTS], *more]))
    if faults:
        raise RecordError(faults[0])
    return edits


def stream_edits(
    path: str | Sequence[str], *, split: str = "train", skip: int = 0, limit: int | None = None, wait: float = 0.0
) -> Iterator[Edit]:
    """Edits one after the other, never holding more than one record; they end where no further line arrives.

    Args:
        path: As for :func:`read_edits`, but a local file has to be a ``.jsonl``.
        split: Split of a hub data set.
        skip: Number of records to skip at the beginning.
        limit: Maximum number of records after that; all where ``None``.
        wait: Seconds to wait for further lines at the end of the last file, counted from the last line that arrived.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        RecordError: If a record is unusable.
    """
    paths = [path] if isinstance(path, str) else list(path)
    records = chain.from_iterable(
        _streamed_records(locate(name), name, split, wait if name == paths[-1] else 0.0) for name in paths
    )
    warned = set[tuple[str, str]]()
    for number, (origin, record) in islice(enumerate(records), skip, None if limit is None else skip + limit):
        edits = parse_records(record, number, origin)
        _warn_of_oddities(record, edits, origin, warned)
        yield from edits


def _streamed_records(found: str, name: str, split: str, wait: float) -> Iterator[tuple[str, Any]]:
    if not Path(found).is_file():
        return _records(found, name, split)  # from the hub, or an error
    if Path(found).suffix.lower() != ".jsonl":
        raise RecordError(f"{name}: a stream reads one record per line; expected a .jsonl file or a hub data set")
    lines = enumerate(_growing_lines(Path(found), wait), start=1)
    return _json_lines((_as_text(line, name, number) for number, line in lines), name)


def _growing_lines(path: Path, wait: float) -> Iterator[bytes]:
    """The lines of a file that others may be writing to: a line counts once it is terminated, or nothing follows."""
    unfinished, since = b"", time.monotonic()
    with path.open("rb") as file:
        while True:
            while not (line := unfinished + file.readline()).endswith(b"\n") and time.monotonic() - since < wait:
                unfinished = line
                time.sleep(_POLL)
            unfinished, since = b"", time.monotonic()
            if not line:
                return
            yield line


def _warn_of_oddities(record: Any, edits: Sequence[Edit], origin: str, warned: set[tuple[str, str]]) -> None:
    """Warn, once per file and kind, of what a usable record probably does not mean.

    Args:
        record: A record of the file.
        edits: What it was read as.
        origin: File and record, for the message.
        warned: Pairs of file and kind with a warning already.
    """
    file = re.split(r", record \d|\[\d", origin)[0]
    misspelled = [f"the field {name!r} (there is {close!r})" for name, close in find_misspelled(record).items()]
    unchanged = [repr(edit.target) for edit in edits if edit.target == edit.target_true]
    spaced = [repr(name) for name in with_outer_space(record)]
    oddities = {
        "ignored: %s; rename, if that is meant": ", ".join(misspelled),
        "white space around %s is left out; an object follows its prompt after a space by itself": ", ".join(spaced),
        "the new object %s is also the old one, so that nothing changes; check 'target_new'": ", ".join(unchanged),
    }  # fmt: skip
    for message, found in oddities.items():
        if found and (file, message) not in warned:
            warned.add((file, message))
            log.warning(f"%s: {message}", origin, found)


def _warn_of_generation_prompts(edits: Sequence[Edit], path: str) -> None:
    """Warn when the paraphrases look like COUNTERFACT's openings for free text, which do not ask for the fact.

    Flat re-publications often carry them in the field for paraphrases; scored as such they give a meaningless
    generalisation. About 5 % of true paraphrases have such a phrasing, and more than half of the openings.
    """
    paraphrases = [p.prompt.strip() for edit in edits for p in edit.probes if p.kind == "generalisation"]
    found = [text for text in paraphrases if _OPENINGS.search(text)]
    if len(paraphrases) >= 10 and len(found) > 0.2 * len(paraphrases):
        log.warning(
            "%s: %d of %d paraphrases look like openings for free text (COUNTERFACT's generation prompts), such as %r: "
            "they do not ask for the fact, and the generalisation is meaningless; take the paraphrases from the native "
            "file", path, len(found), len(paraphrases), found[0],
        )  # fmt: skip


def _records(found: str, name: str, split: str) -> Iterator[tuple[str, Any]]:
    """Pairs of origin and record."""
    suffix = Path(found).suffix.lower()
    if name in _BUILT and not Path(found).exists():
        yield from _numbered(_BUILT[name](), name)
    elif not Path(found).is_file():
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
        yield from _numbered(_csv_rows(found, name) if suffix == ".csv" else _parquet_rows(found, name), name)
    else:
        raise RecordError(f"{name}: unknown ending {suffix!r}; expected .json, .jsonl, .csv or .parquet")


def _numbered(rows: Any, name: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows):
        yield f"{name}, record {number}", row


def _json_records(found: str, name: str) -> Iterator[tuple[str, Any]]:
    """A JSON list, or one JSON value per line, whatever the file's extension."""
    text = _as_text(Path(found).read_bytes(), name)
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise _broken_json(name, error.lineno, error) from error
        yield from _numbered(records, name)
    else:
        yield from _json_lines(io.StringIO(text, newline=None), name)  # splitlines would also split inside texts


def _as_text(data: bytes, name: str, first_line: int = 1) -> str:
    """Bytes of a file, from the beginning of a line on, as UTF-8 text without a byte order mark.

    Raises:
        RecordError: If they are not UTF-8; the message names the line.
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
    """One record per line, whose number errors name; blank lines are skipped."""
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
        "one record per line"
    )


def _csv_rows(found: str, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file: cells are text, empty ones are left out, and JSON lists and objects are those."""
    reader = csv.reader(io.StringIO(_as_text(Path(found).read_bytes(), name), newline=""), strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        for cells in filter(None, reader):
            if len(cells) > len(header):
                raise RecordError(
                    f"{name}, line {reader.line_num}: {len(cells)} cells, expected at most {len(header)} as in the "
                    "header; put texts with a comma between double quotes"
                )
            yield {column: _cell(cell) for column, cell in zip(header, cells, strict=False) if cell}
    except csv.Error as error:
        raise RecordError(f"{name}, line {reader.line_num}: cannot be read as csv: {error}") from error


def _cell(cell: str) -> Any:
    if not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        return json.loads(cell) or cell  # "{}" is a prompt that is nothing but its subject
    except json.JSONDecodeError:
        return cell


def _parquet_rows(found: str, name: str) -> Any:
    import datasets

    try:
        return datasets.Dataset.from_parquet(found)
    except Exception as error:  # pyarrow raises many types; all mean that the file is not such a table
        raise RecordError(f"{name}: cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _hub_rows(name: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:
        raise FileNotFoundError(
            f"no edits file {name!r} here, and the hub data set of that name cannot be read "
            f"({str(error).splitlines()[0]}); set --data.path to a local file"
        ) from error

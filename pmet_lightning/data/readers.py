"""From a file or a hub data set to validated edits.

JSON and CSV are parsed by ``text_files``, so that an error names the line and a cell stays text; Parquet and the hub go
through the ``datasets`` library.
"""

from __future__ import annotations

import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pmet_lightning.data import earth
from pmet_lightning.data.fields import (
    RecordError,
    check_no_faults,
    find_foreign,
    find_misspelled,
    format_of,
    is_missing,
    with_outer_space,
)
from pmet_lightning.data.records import Edit, ZsreTarget, check_no_contradictions, parse_records
from pmet_lightning.data.tables import as_rows
from pmet_lightning.data.text_files import as_text, csv_rows, json_lines, json_rows, numbered
from pmet_lightning.utils.errors import first_line
from pmet_lightning.utils.hub import check_reachable
from pmet_lightning.utils.resources import locate

log = logging.getLogger(__name__)

_POLL = 0.2  # seconds between two reads at the end of a growing file
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
    path: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    skip: int = 0,
    limit: int | None = None,
    shuffle: int | None = None,
    zsre_target: ZsreTarget = "answers",
) -> list[Edit]:
    """Read and validate the edits of a file or a hub data set, or of several, one after the other.

    Args:
        path: A local ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file, a shipped name, or a hub name.
        split: Split of a hub data set.
        skip: Number of records to skip at the beginning.
        limit: Maximum number of records after that; all where ``None``.
        shuffle: Seed of a shuffle before ``skip`` and ``limit``; the file's order where ``None``.
        zsre_target: The new object of a zsRE record: the first of ``answers``, the true one, or the counterfactual
            ``alt``.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        RecordError: If the file is empty or broken, or a record taken from it is unusable.
    """
    edits = _parse_all(read_records(path, split=split, skip=skip, limit=limit, shuffle=shuffle), zsre_target)
    check_no_contradictions(edits)
    _warn_of_generation_prompts(edits, ", ".join(_names(path)))
    return edits


def read_records(
    path: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    skip: int = 0,
    limit: int | None = None,
    shuffle: int | None = None,
) -> list[tuple[int, str, Any]]:
    """Records of any format, as stored in the file: number, origin for messages, and the record.

    In the place of a broken JSON line is the error that names it; :func:`~pmet_lightning.data.records.parse_records`
    raises it.

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
    paths = _names(path)

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


def _names(path: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(name) for name in ([path] if isinstance(path, (str, Path)) else path)]


def as_edits(facts: Any, name: str = "facts", *, zsre_target: ZsreTarget = "answers") -> list[Edit]:
    """Validate edits that are given as objects, and return them.

    Args:
        facts: Records as in a file (COUNTERFACT, zsRE or flat), edits, a mixture of both, or a table or columns of
            them, as :func:`~pmet_lightning.data.tables.as_rows` takes them.
        name: Their name in messages: the fourth is "facts[3]".
        zsre_target: As for :func:`read_edits`.

    Raises:
        RecordError: If there are none, or one is unusable.
    """
    edits = _parse_all(((number, f"{name}[{number}]", fact) for number, fact in enumerate(as_rows(facts))), zsre_target)
    if not edits:
        raise RecordError(f"{name}: nothing to edit, expected at least one record")
    check_no_contradictions(edits)
    _warn_of_generation_prompts(edits, name)
    return edits


def _parse_all(records: Iterable[tuple[int, str, Any]], zsre_target: ZsreTarget) -> list[Edit]:
    """Edits of records with their numbers and origins; edits among them stay, with that origin before their own.

    Raises:
        RecordError: If some are unusable; it names all of them, so that a file is mended in one go.
    """
    edits: list[Edit] = []
    faults: list[str] = []
    told = set[tuple[str, str]]()
    for number, origin, record in records:
        if isinstance(record, Edit):
            edits.append(replace(record, origin=f"{origin} ({record.origin})" if record.origin else origin))
            continue
        try:
            edits += _parse(record, number, origin, zsre_target, told)
        except RecordError as error:
            faults.append(str(error))
    check_no_faults(faults, "records are unusable")
    return edits


def _parse(record: Any, number: int, origin: str, zsre_target: ZsreTarget, told: set[tuple[str, str]]) -> list[Edit]:
    """The edits of a record, after its oddities were told.

    Args:
        record: The record.
        number: Its position.
        origin: File and record, for messages.
        zsre_target: As for :func:`read_edits`.
        told: Pairs of file and message that were logged already, to which those of this record are added.

    Raises:
        RecordError: If it is unusable.
    """
    edits = parse_records(record, number, origin, zsre_target)
    file = re.split(r", record \d|\[\d", origin)[0]
    for level, message, found in _oddities(record, edits, zsre_target):
        if found and (file, message) not in told:
            told.add((file, message))
            log.log(level, f"%s: {message}", origin, found)
    return edits


def stream_edits(
    path: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    skip: int = 0,
    limit: int | None = None,
    wait: float = 0.0,
    zsre_target: ZsreTarget = "answers",
) -> Iterator[Edit]:
    """Edits one after the other, never holding more than one record; they end where no further line arrives.

    Args:
        path: As for :func:`read_edits`, but a local file has to be a ``.jsonl``.
        split: Split of a hub data set.
        skip: Number of records to skip at the beginning.
        limit: Maximum number of records after that; all where ``None``.
        wait: Seconds to wait for further lines at the end of the last file, counted from the last line that arrived.
        zsre_target: As for :func:`read_edits`.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        RecordError: If a record is unusable.
    """
    paths = _names(path)
    records = chain.from_iterable(
        _streamed_records(locate(name), name, split, wait if name == paths[-1] else 0.0) for name in paths
    )
    told = set[tuple[str, str]]()
    for number, (origin, record) in islice(enumerate(records), skip, None if limit is None else skip + limit):
        yield from _parse(record, number, origin, zsre_target, told)


def _streamed_records(found: str, name: str, split: str, wait: float) -> Iterator[tuple[str, Any]]:
    if not Path(found).is_file():
        return _records(found, name, split)  # from the hub, or an error
    if Path(found).suffix.lower() != ".jsonl":
        raise RecordError(f"{name}: a stream reads one record per line; expected a .jsonl file or a hub data set")
    lines = enumerate(_growing_lines(Path(found), wait), start=1)
    return json_lines((as_text(line, name, number) for number, line in lines), name)


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


def _oddities(record: Any, edits: Sequence[Edit], zsre_target: ZsreTarget) -> Iterator[tuple[int, str, str]]:
    """What a usable record may not be meant to say: level, message, and what was found ("" if nothing).

    Args:
        record: A record of the file.
        edits: What it was read as.
        zsre_target: As for :func:`read_edits`.
    """
    kind, unread = format_of(record), "alt" if zsre_target == "answers" else ""
    misspelled = [f"the field {name!r} (there is {close!r})" for name, close in find_misspelled(record).items()]
    foreign = [repr(name) for name in find_foreign(record)]
    spaced = [repr(name) for name in with_outer_space(record) if name != unread]
    unchanged = [repr(edit.target) for edit in edits if edit.target == edit.target_true]
    found = {
        "ignored: %s; rename, if that is meant": misspelled,
        f"ignored: %s, which {kind} records do not have; rename, or leave it out": foreign,
        "white space around %s is left out; --model.join says how an object follows its prompt": spaced,
        "the new object %s is also the old one, so that nothing changes; check both": unchanged,
    }
    for message, names in found.items():
        yield logging.WARNING, message, ", ".join(names)
    if kind == "zsRE" and not (is_missing(record.get("answers")) or is_missing(record.get("alt"))):
        yield logging.INFO, "zsRE records with 'answers' and 'alt' are edited to %s (zsre_target)", repr(zsre_target)


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
        yield from numbered(_BUILT[name](), name)
    elif not Path(found).is_file():
        if suffix in (".json", ".jsonl", ".csv", ".parquet") or Path(found).exists():
            raise FileNotFoundError(
                f"no edits file {name!r} (looked in {Path.cwd()}); set --data.path to a .json, .jsonl, .csv or "
                ".parquet file or to a data set on the hub"
            )
        yield from numbered(_hub_rows(found, split), name)
    elif Path(found).stat().st_size == 0:
        raise RecordError(f"{name}: the file is empty; expected a JSON list, JSON lines, CSV or Parquet")
    elif suffix in (".json", ".jsonl"):
        yield from json_rows(Path(found), name)
    elif suffix in (".csv", ".parquet"):
        yield from numbered(_csv_records(found, name) if suffix == ".csv" else _parquet_rows(found, name), name)
    else:
        raise RecordError(f"{name}: unknown ending {suffix!r}; expected .json, .jsonl, .csv or .parquet")


def _csv_records(found: str, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file: empty cells are left out, and JSON lists and objects are those."""
    for row in csv_rows(Path(found), name):
        yield {column: _cell(cell) for column, cell in row.items() if cell}


def _cell(cell: str) -> Any:
    if not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        return json.loads(cell) or cell  # "{}" is a prompt that is nothing but its subject
    except (ValueError, RecursionError):  # a text that only begins as JSON does
        return cell


def _parquet_rows(found: str, name: str) -> Any:
    import datasets

    try:
        return datasets.Dataset.from_parquet(found)
    except Exception as error:  # pyarrow raises many types; all mean that the file is not such a table
        raise RecordError(f"{name}: cannot be read as parquet: {first_line(error)}") from error


def _hub_rows(name: str, split: str) -> Any:
    import datasets

    try:
        check_reachable()
        return datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:
        raise FileNotFoundError(
            f"no edits file {name!r} here, and the hub data set of that name cannot be read "
            f"({first_line(error)}); set --data.path to a local file"
        ) from error

"""Text files as rows: UTF-8 whose errors name the line, JSON and JSON lines, CSV in which every cell is text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pmet_lightning.data.fields import RecordError, check_no_column_twice


def as_text(data: bytes, name: str, first_line: int = 1) -> str:
    """Bytes of a file, from the beginning of a line on, as UTF-8 text without a byte order mark.

    Args:
        data: The bytes.
        name: Name of the file in messages.
        first_line: Number of the line that they begin with.

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


def check_encoding(path: Path, name: str) -> None:
    """Read a file line by line, and find what is not UTF-8.

    Args:
        path: The file.
        name: Its name in messages.

    Raises:
        RecordError: If there is such a line; the message names the first.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            as_text(line, name, number)


def json_rows(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Origin and value of each item of a JSON list, or of each line, whatever the file's extension.

    Args:
        path: The file.
        name: Its name in messages.

    Raises:
        RecordError: If the file is not UTF-8, or is a broken JSON list.
    """
    text = as_text(path.read_bytes(), name)
    if not text.lstrip().startswith("["):
        return json_lines(io.StringIO(text, newline=None), name)  # splitlines would also split inside texts
    return numbered(_parse(text, name), name)


def json_lines(lines: Iterable[str], name: str) -> Iterator[tuple[str, Any]]:
    """Origin and value of each line; blank lines are skipped.

    The value of a broken line is the error that names it, to be raised where the record would be read: the lines after
    it can be read nevertheless.

    Args:
        lines: The lines.
        name: Name of the file in messages.
    """
    number = 0
    for line_number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{name}, record {number} (line {line_number})", _json_value(line, name, line_number)
            number += 1


def numbered(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    """Origin and value of each row."""
    for number, row in enumerate(rows):
        yield f"{name}, record {number}", row


def csv_rows(path: Path, name: str) -> Iterator[dict[str, str]]:
    """The rows of a CSV file, one at a time: cells by the column's name, all of them text, "" where one is empty.

    Args:
        path: The file.
        name: Its name in messages.

    Raises:
        RecordError: If the file is not UTF-8 or no CSV, two columns have one name, or a row has more cells than the
            header; it names the line.
    """
    reader = csv.reader(_lines(path, name), strict=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        check_no_column_twice(header, f"{name}, line {reader.line_num}")
        for cells in filter(None, reader):
            if len(cells) > len(header):
                raise RecordError(
                    f"{name}, line {reader.line_num}: {len(cells)} cells, expected at most {len(header)} as in the "
                    "header; put texts with a comma between double quotes"
                )
            yield dict.fromkeys(header, "") | dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise RecordError(f"{name}, line {reader.line_num}: cannot be read as csv: {error}") from error


def _lines(path: Path, name: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError:
        check_encoding(path, name)
        raise


def _json_value(line: str, name: str, number: int) -> Any:
    try:
        return _parse(line, name, number)
    except RecordError as error:
        return error


def _parse(text: str, name: str, line: int | None = None) -> Any:
    """The value of a JSON text: of a line of a file, or of a whole one where ``line`` is ``None``."""
    expected = "expected a list of records or one record per line"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{name}, line {line or error.lineno}: broken JSON ({error.msg}, column {error.colno}); {expected}"
        ) from error
    except (RecursionError, ValueError) as error:  # brackets in brackets in brackets; a number of thousands of digits
        where = name if line is None else f"{name}, line {line}"
        raise RecordError(f"{where}: JSON that cannot be read ({error}); {expected}") from error

"""What a run records after each edit batch, and reads when it is resumed: append-only files.

``ledger.jsonl`` has a line for each edit, ``batches.jsonl`` one for each edit batch; both are written before the patch,
whose manifest says how many edit batches are valid. ``answers.jsonl`` has the answers to the questions of each edit, of
a stream after each edit batch, of all other runs at the end.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pmet_lightning.utils.files import atomic_path, name_in_errors

LEDGER = "ledger.jsonl"
BATCHES = "batches.jsonl"
ANSWERS = "answers.jsonl"
VALIDATED = "answers-validate.jsonl"  # of the command validate


class Journal:
    """The files of a run folder.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.ledger_path, self.batches_path = folder / LEDGER, folder / BATCHES
        self.answers_path = folder / ANSWERS

    def add(
        self,
        ledger: Sequence[Mapping[str, Any]],
        entry: Mapping[str, Any],
        answers: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Append one edit batch.

        Args:
            ledger: Lines of its edits.
            entry: What is recorded of the batch itself.
            answers: Lines of answers, for a stream.
        """
        if answers:
            _append(self.answers_path, [json.dumps(line, ensure_ascii=False) for line in answers])
        _append(self.ledger_path, [json.dumps(line, ensure_ascii=False) for line in ledger])
        _append(self.batches_path, [json.dumps({**entry, "edits": len(ledger)})])

    def keep(self, batches: int) -> int:
        """Truncate what a killed run has written beyond its patch; returns the number of edits that are kept.

        Args:
            batches: Number of valid edit batches.

        Raises:
            ValueError: If some of these are missing.
        """
        entries = itertools.islice(self.batches(), batches)
        edits = sum(entry["edits"] for entry in entries)
        found = _length(self.batches_path, batches), _length(self.ledger_path, edits)
        if (found[0].lines, found[1].lines) != (batches, edits):
            raise ValueError(
                f"{self.batches_path} and {self.ledger_path} hold {found[0].lines} edit batches and {found[1].lines} "
                f"edits, the patch beside them {batches} and {edits}: the run cannot be resumed; begin a new one"
            )
        for path, kept in zip((self.batches_path, self.ledger_path), found, strict=True):
            if path.is_file():
                os.truncate(path, kept.bytes)
        answers = _length(self.answers_path, edits)
        if self.answers_path.is_file():
            os.truncate(self.answers_path, answers.bytes)
        return edits

    def write_answers(self, lines: Iterable[Mapping[str, Any]], name: str = ANSWERS) -> None:
        """Write the answers of an evaluation as one file.

        Args:
            lines: One for each edit.
            name: Name of the file.
        """
        with atomic_path(self.answers_path.with_name(name)) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)

    def edits(self) -> Iterator[dict[str, Any]]:
        """Lines of the edits."""
        return (json.loads(line) for line in _lines(self.ledger_path))

    def answers(self) -> Iterator[dict[str, Any]]:
        """Lines of answers, in the order of the edits."""
        return (json.loads(line) for line in _lines(self.answers_path))

    def batches(self) -> Iterator[dict[str, Any]]:
        """What is recorded of each edit batch."""
        return (json.loads(line) for line in _lines(self.batches_path))


def _lines(path: Path) -> Iterator[str]:
    """Complete lines of a file that may not exist."""
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    yield line.removesuffix("\n")


class _Length(NamedTuple):
    lines: int
    bytes: int


def _length(path: Path, max_lines: int) -> _Length:
    """How many complete lines a file begins with, at most ``max_lines``, and the bytes that they take."""
    lines = size = 0
    if path.is_file():
        with path.open("rb") as file:
            for line in itertools.islice(file, max_lines):
                if line.endswith(b"\n"):
                    lines, size = lines + 1, size + len(line)
    return _Length(lines, size)


def _append(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with name_in_errors(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())

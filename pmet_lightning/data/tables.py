"""Facts in the objects that programs hold them in: tables, columns, rows of tables. They become records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from pmet_lightning.data.fields import RecordError, check_no_column_twice
from pmet_lightning.data.records import Edit

_COLUMNS_OF_FACTS = ("subject", "prompt", "prompts", "src", "requested_rewrite")
_COLUMN_NAMES = {"prompts": "prompt", "rephrase_prompts": "rephrase_prompt"}  # EasyEdit's names of parallel lists


def as_rows(facts: Any) -> Iterator[Any]:
    """Records, one after the other, without missing cells.

    Args:
        facts: One record or edit, several of them, a table (a DataFrame of pandas or polars, a Table of pyarrow, a
            Dataset of datasets), or a mapping of parallel lists (``{"prompt": [...], "subject": [...], ...}``).

    Raises:
        RecordError: If it is none of these, or columns differ in length.
    """
    if isinstance(facts, Edit) or (isinstance(facts, Mapping) and not _is_columns(facts)):
        return iter([_plain_row(facts)])
    rows = _rows_of_table(facts)
    if not isinstance(rows, Iterable):
        raise RecordError(
            f"facts: got {type(facts).__name__}, expected records (mappings with prompt, subject and target_new), a "
            "table with such columns, or the name of a file"
        )
    return (_plain_row(row) for row in rows)


def _is_columns(facts: Mapping[str, Any]) -> bool:
    """Whether a mapping holds columns of facts: texts of one fact are no lists."""
    return any(_is_column(facts[name]) for name in _COLUMNS_OF_FACTS[:-1] if name in facts)


def _is_column(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def _rows_of_table(facts: Any) -> Any:
    """The rows of a table, by the methods that its library gives it; anything else as it is."""
    if isinstance(facts, Mapping):
        return _rows_of_columns({name: list(column) for name, column in facts.items() if _is_column(column)}, facts)
    if hasattr(facts, "convert_dtypes") and hasattr(facts, "columns"):  # pandas
        return _rows_of_frame(facts)
    for method in ("to_dicts", "to_pylist"):  # polars, pyarrow
        if hasattr(facts, method):
            return getattr(facts, method)()
    return facts


def _rows_of_frame(frame: Any) -> list[dict[Any, Any]]:
    """The rows of a DataFrame of pandas.

    Raises:
        RecordError: If two columns have one name.
    """
    check_no_column_twice(list(frame.columns), "facts")
    found = frame.copy(deep=False)
    for name in frame.columns:
        if frame[name].isna().any():  # where cells are missing, whole numbers are held as 1990.0
            found[name] = frame[name].convert_dtypes()
    return found.to_dict("records")  # type: ignore[no-any-return]


def _rows_of_columns(columns: Mapping[str, list[Any]], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise RecordError(f"facts: parallel lists of different lengths ({lengths}), expected one entry for each fact")
    same = {name: value for name, value in facts.items() if name not in columns}  # for all of the facts
    names = [_COLUMN_NAMES.get(name, name) for name in columns]
    return [same | dict(zip(names, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _plain_row(row: Any) -> Any:
    """A record as a mapping of plain values: of a row of pandas, a named tuple or a dataclass too."""
    if isinstance(row, (Edit, str)):
        return row
    if hasattr(row, "_asdict"):
        row = row._asdict()
    elif is_dataclass(row) and not isinstance(row, type):
        row = asdict(row)
    elif not isinstance(row, Mapping) and hasattr(row, "to_dict"):
        row = row.to_dict()
    if not isinstance(row, Mapping):
        return row
    return {name: _plain_value(value) for name, value in row.items() if not _is_missing(value)}


def _plain_value(value: Any) -> Any:
    """Numbers and arrays of NumPy as Python's own."""
    return value.tolist() if hasattr(value, "dtype") and hasattr(value, "tolist") else value


def _is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, NaN, NaT, NA."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and value != value

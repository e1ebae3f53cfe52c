"""Fields of a record, each validated: a text, several texts, a name; and oddities that a warning names."""

from __future__ import annotations

import difflib
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pmet_lightning.utils.errors import PmetError

Format = Literal["COUNTERFACT", "MQuAKE", "zsRE", "flat"]
# The fields that are read, by format; those of a rewrite are inside COUNTERFACT's and MQuAKE's.
_REWRITE = ("prompt", "subject", "target_new", "target_true", "relation_id")
_READ: dict[Format, tuple[str, ...]] = {
    "COUNTERFACT": (
        "case_id", "id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "generation_prompts",
    ),
    "MQuAKE": ("case_id", "id", "requested_rewrite", "questions", "new_answer", "new_answer_alias"),
    "zsRE": ("case_id", "id", "src", "subject", "answers", "alt", "rephrase", "loc", "loc_ans"),
    "flat": (  # EasyEdit's and LocFT's names, KnowEdit's, QAEdit's and WikiBigEdit's own
        "case_id", "id", "prompt", "update", "subject", "target_new", "target", "ans", "ground_truth", "target_true",
        "rephrase_prompt", "rephrase", "relation", "locality_prompt", "locality_ground_truth", "loc", "loc_ans",
        "locality", "portability", "personas", "mhop", "mhop_ans",
    ),
}  # fmt: skip
# Fields that their files have as well: they ask nothing that is scored here.
_UNREAD_OF_REWRITES = ("question", "question_id")
_UNREAD: dict[Format, tuple[str, ...]] = {
    "COUNTERFACT": ("attribute_prompts", "pararel_idx"),
    "MQuAKE": ("answer", "answer_alias", "new_single_hops", "single_hops"),
    "zsRE": ("pred", "cond"),
    "flat": ("source", "object", "tag"),
}
_CONTEXT = ("prompt", "update", "src", "subject")
_OBJECTS = ("target_new", "target", "ans", "answers", "alt", "target_true", "ground_truth")
_SHOWN_FAULTS = 20
_UNSEEN = {"Zs", "Zl", "Zp", "Cc", "Cf"}  # categories of Unicode
_SHORTEST = 3  # letters of a name that another one may be close to: 'idx' is not meant as 'id'
_CLOSE = 0.8  # difflib's ratio: 'rephrase_prompts' is so close to 'rephrase_prompt', 'target_true' not to 'target_new'


class RecordError(PmetError):
    """A record that cannot become an edit; the message says where, what was found and what was expected."""


def check_no_faults(faults: Sequence[str], what: str) -> None:
    """Refuse records, all of them in one error, so that a file is mended in one go.

    Args:
        faults: What is wrong with each.
        what: What they are: "records are unusable".

    Raises:
        RecordError: If there is a fault; it shows at most 20.
    """
    if len(faults) > 1:
        more = [f"and {len(faults) - _SHOWN_FAULTS} more"] * (len(faults) > _SHOWN_FAULTS)
        raise RecordError("\n".join([f"{len(faults)} {what}:", *faults[:_SHOWN_FAULTS], *more]))
    if faults:
        raise RecordError(faults[0])


def check_no_column_twice(columns: Sequence[Any], where: str) -> None:
    """Refuse a table in which two columns have one name: only one of them could be read.

    Args:
        columns: The names; several may be empty.
        where: Which table it is.

    Raises:
        RecordError: If there is such a name.
    """
    twice = [column for column, count in Counter(columns).items() if count > 1 and column != ""]
    if twice:
        raise RecordError(
            f"{where}: several columns are named {', '.join(map(repr, twice))}, expected a name of its own for each; "
            "rename or remove all but one"
        )


def is_missing(value: Any) -> bool:
    """Whether a field holds nothing: ``None``, or the NaN that tables have in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def items(value: Any) -> list[Any]:
    """The contents of a field that may hold one item, several or none."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def texts(fields: Mapping[str, Any], name: str, origin: str) -> list[str]:
    """Texts of a field that holds one, several or none; blank ones are left out.

    Raises:
        RecordError: If something in it is not a text.
    """
    return checked_texts(fields.get(name), repr(name), origin)


def checked_texts(value: Any, name: str, origin: str) -> list[str]:
    """One text or several, as stored in a field; blank ones are left out.

    Args:
        value: What the field holds.
        name: Its name in messages.
        origin: File and record, for messages.

    Raises:
        RecordError: If something in it is not a text.
    """
    found = []
    for item in items(value):
        text = _plain(item)
        if is_missing(item):
            continue
        if not isinstance(text, str):
            raise RecordError(
                f"{origin}: the field {name} holds {item!r} ({type(item).__name__}), expected a text or a list of "
                "texts; write each as a string"
            )
        found += [] if _is_blank(text) else [text]
    return found


def _is_blank(text: str) -> bool:
    """Whether there is nothing to read in a text: white space, control characters, others that are not seen."""
    return all(unicodedata.category(c) in _UNSEEN for c in text)


def text(fields: Mapping[str, Any], name: str, origin: str) -> str:
    """A text field that must be present and not blank, without white space around it; ``{"str": …}`` counts as text.

    Raises:
        RecordError: If it is missing, blank or not a text.
    """
    if name not in fields:
        hint = " This one has known_facts' field 'attribute': such records are for analyze and name no new object."
        raise RecordError(
            f"{origin}: no field {name!r}; found {', '.join(map(repr, fields)) or 'nothing'}. Expected "
            "COUNTERFACT records (requested_rewrite), zsRE records (src, subject, answers) or flat ones "
            f"(prompt, subject, target_new).{hint if 'attribute' in fields else ''}"
        )
    value = fields[name]
    value = _plain(value.get("str") if isinstance(value, Mapping) else value)
    if not isinstance(value, str) or _is_blank(value):
        raise RecordError(f"{origin}: the field {name!r} is {value!r}, expected a text that is not empty")
    return value.strip()


def optional_text(fields: Mapping[str, Any], name: str, origin: str) -> str | None:
    """As :func:`text`; ``None`` where the field is missing or empty (0 is a value).

    Raises:
        RecordError: If it is blank or not a text.
    """
    return None if fields.get(name) in (None, "", {}) else text(fields, name, origin)


def name_in(fields: Any, name: str, origin: str) -> str | None:
    """A name, which may be written as a number; ``None`` where there is none.

    Raises:
        RecordError: If it is neither a text nor a number.
    """
    value = fields.get(name) if isinstance(fields, Mapping) else None
    if value is None:
        return None
    found = _plain(value)
    if not isinstance(found, str):
        raise RecordError(
            f"{origin}: the field {name!r} is {value!r}, expected a name (a text or a number); write it as a string"
        )
    return found


def format_of(record: Mapping[str, Any]) -> Format:
    """The format of a record."""
    rewrite = record.get("requested_rewrite")
    if not is_missing(rewrite):
        return "MQuAKE" if isinstance(rewrite, list) else "COUNTERFACT"
    return "flat" if is_missing(record.get("src")) else "zsRE"


def find_misspelled(record: Mapping[str, Any]) -> dict[str, str]:
    """Unknown field names that are close to a known one, with the name that was probably meant.

    Args:
        record: A record of any format.
    """
    kind = format_of(record)
    found = _close_names(record, _READ[kind], (*_UNREAD[kind], *find_foreign(record)))
    for rewrite in _rewrites(record):
        found |= _close_names(rewrite, _REWRITE, _UNREAD_OF_REWRITES)
    return found


def find_foreign(record: Mapping[str, Any]) -> list[str]:
    """Names of fields that are read in records of another format, and that this one's does not have.

    Args:
        record: A record of any format.
    """
    kind = format_of(record)
    foreign = {name for names in _READ.values() for name in names}.difference(_READ[kind], _UNREAD[kind])
    return [name for name, value in record.items() if name in foreign and not is_missing(value)]


def _rewrites(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [rewrite for rewrite in items(record.get("requested_rewrite")) if isinstance(rewrite, Mapping)]


def with_outer_space(record: Mapping[str, Any]) -> list[str]:
    """Names of the fields of a fact whose text begins or ends with white space (one space may begin an object).

    Args:
        record: A record of any format.
    """
    found = []
    for fields in _rewrites(record) or [record]:
        for name in (*_CONTEXT, *_OBJECTS):
            value = _as_stored(fields, name)
            found += [name] if value.strip() != value.removeprefix(" " * (name in _OBJECTS)) else []
    return list(dict.fromkeys(found))


def _as_stored(fields: Mapping[str, Any], name: str) -> str:
    value = next(iter(items(fields.get(name))), None)  # the first one is the object
    value = value.get("str") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else ""


def _close_names(fields: Mapping[str, Any], read: tuple[str, ...], others: tuple[str, ...]) -> dict[str, str]:
    absent = [name for name in read if name not in fields and len(name) >= _SHORTEST]
    found: dict[str, str] = {}
    for name in fields:
        close = difflib.get_close_matches(str(name).lower(), absent, 1, _CLOSE) if name not in (*read, *others) else []
        found |= {str(name): close[0]} if close else {}
    return found


def _plain(value: Any) -> Any:
    """A number as text: years are often written without quotes. NaN and the infinite ones are no numbers."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if is_number else value

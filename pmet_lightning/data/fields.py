"""Fields of a record, each validated: a text, several texts, a name; and oddities that a warning names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pmet_lightning.utils.errors import PmetError

# Fields that records of each format have, read or not; those of a rewrite are inside COUNTERFACT's and MQuAKE's.
_REWRITE = ("prompt", "subject", "target_new", "target_true", "relation_id", "question", "question_id")
_COUNTERFACT = (
    "case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "generation_prompts",
    "attribute_prompts", "pararel_idx",
)  # fmt: skip
_MQUAKE = ("questions", "new_answer", "new_answer_alias", "answer", "answer_alias", "new_single_hops", "single_hops")
_ZSRE = ("case_id", "src", "subject", "answers", "rephrase", "loc", "loc_ans", "alt", "pred", "cond")
_FLAT = (
    "case_id", "prompt", "subject", "target_new", "target", "ground_truth", "rephrase_prompt", "rephrase", "relation",
    "locality_prompt", "locality_ground_truth", "portability", "locality",
)  # fmt: skip
_CONTEXT, _OBJECTS = ("prompt", "src", "subject"), ("target_new", "target", "target_true", "ground_truth")
_CLOSE = 0.8  # difflib's ratio: 'rephrase_prompts' is so close to 'rephrase_prompt', 'target_true' not to 'target_new'


class RecordError(PmetError):
    """A record that cannot become an edit; the message says where, what was found and what was expected."""


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
        if item is not None and not isinstance(text, str):
            raise RecordError(
                f"{origin}: the field {name} holds {item!r} ({type(item).__name__}), expected a text or a list of "
                "texts; write each as a string"
            )
        found += [text] if text and text.strip() else []
    return found


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
    if not isinstance(value, str) or not value.strip():
        raise RecordError(f"{origin}: the field {name!r} is {value!r}, expected a text that is not empty")
    return value.strip()


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


def find_misspelled(record: Any) -> dict[str, str]:
    """Unknown field names that are close to a known one, with the name that was probably meant.

    Args:
        record: A record of any format.
    """
    if not isinstance(record, Mapping):
        return {}
    if "requested_rewrite" in record:
        found = _close_names(record, (*_COUNTERFACT, *_MQUAKE))
        for rewrite in items(record["requested_rewrite"]):
            found |= _close_names(rewrite, _REWRITE) if isinstance(rewrite, Mapping) else {}
        return found
    return _close_names(record, _ZSRE if "src" in record else _FLAT)


def with_outer_space(record: Any) -> list[str]:
    """Names of the fields of a fact whose text begins or ends with white space (one space may begin an object).

    Args:
        record: A record of any format.
    """
    if not isinstance(record, Mapping):
        return []
    rewrites = [rewrite for rewrite in items(record.get("requested_rewrite")) if isinstance(rewrite, Mapping)]
    found = []
    for fields in rewrites or [record]:
        for name in (*_CONTEXT, *_OBJECTS):
            value = _as_stored(fields, name)
            found += [name] if value.strip() != value.removeprefix(" " * (name in _OBJECTS)) else []
    return list(dict.fromkeys(found))


def _as_stored(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    value = value.get("str") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else ""


def _close_names(fields: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, str]:
    absent = [name for name in known if name not in fields]
    found: dict[str, str] = {}
    for name in fields:
        close = difflib.get_close_matches(str(name).lower(), absent, 1, _CLOSE) if name not in known else []
        found |= {str(name): close[0]} if close else {}
    return found


def _plain(value: Any) -> Any:
    """A number as text: years are often written without quotes."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value

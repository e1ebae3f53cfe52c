"""The options of all commands, read from a file: to show them and to check what is given takes no heavy import.

``options.json`` is made from the parsers themselves (``python -m pmet_lightning.cli.make_options``); a test compares
them. The parsers remain the authority: what passes here is parsed and checked by them again. A kind of value is

- ``bool``, ``str``, ``null`` or ``any``; ``int`` or ``float``, with a bound: ``int>=0``, ``float>0``;
- ``=word`` for a word or number that is meant literally;
- ``list:`` and the kinds of its items, separated by commas.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pmet_lightning.run.trainer_arguments import refusal
from pmet_lightning.utils.errors import PmetError

FILE = Path(__file__).with_name("options.json")
_BOUNDED = re.compile(r"(int|float)(?:(>=?)(\d+))?$")
_WORDS = {"bool": "true or false", "null": "null", "str": "a text", "any": "a value"}
_NUMBERS = {"int": "a whole number", "float": "a number"}


class UsageError(PmetError):
    """A command line or configuration with an unknown name or a value that is not valid."""


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: Its name, with its section and a dot where it has one.
        kinds: Kinds of values that it takes.
        default: Its default, as JSON has it.
        help: What it means.
        required: Whether it must be given.
    """

    name: str
    kinds: tuple[str, ...]
    default: Any
    help: str
    required: bool = False

    def expected(self) -> str:
        """The values that it takes, in words."""
        return _in_words(self.kinds)

    def problem(self, value: Any, one: bool = False) -> str | None:
        """What is wrong with a value, as one sentence; ``None`` if nothing is.

        Args:
            value: A value of a configuration, or a text of the command line.
            one: Whether the value may be one item of a list, too.
        """
        items = [item for kind in self.kinds if one and kind.startswith("list:") for item in kind[5:].split(",")]
        if any(_fits(kind, value) for kind in (*self.kinds, *items)):
            return None
        shown = json.dumps(value, default=str) if value == "" or not isinstance(value, str) else value
        return f"{self.name} is {shown}, expected {self.expected()}"


@cache
def options_of(command: str) -> dict[str, Option]:
    """The options of a command by name; empty for a command that is not in the file."""
    found = json.loads(FILE.read_text(encoding="utf-8")).get(command, [])
    return {o["name"]: Option(**{**o, "kinds": tuple(o["kinds"])}) for o in found}


def check_settings(command: str, settings: Mapping[str, Any], where: str = "", options: bool = False) -> None:
    """Check the names and values of nested settings, as in a configuration.

    Args:
        command: The command that they are for.
        settings: The settings by section.
        where: The configuration, for the error.
        options: Whether the error calls settings as the options of the command line.

    Raises:
        UsageError: With the first problem, as one sentence.
    """
    start = f"{where}: " if where else ""
    for name, value in _flat(command, settings, ""):
        problem = _no_section(command, name, value) or problem_with(command, name, value)
        if problem is not None:
            raise UsageError(start + (as_option(problem) if options else problem))


def problem_with(command: str, name: str, value: Any) -> str | None:
    """What is wrong with one setting, as one sentence; ``None`` if nothing is.

    Args:
        command: The command.
        name: Name with section; a + at its end appends to a list.
        value: Its value.
    """
    options = options_of(command)
    option = options.get(name.removesuffix("+"))
    if option is None:
        return None if _is_inside(name, options) else _unknown(name, options)
    section, _, last = name.rpartition(".")
    refused = refusal(last, _parsed(value)) if section == "trainer" else None
    if refused is not None:
        return refused
    return option.problem(value, one=name.endswith("+"))


def as_option(problem: str) -> str:
    """A problem of one setting in the words of the command line."""
    if problem.startswith("there is no setting "):
        return problem.replace("there is no setting ", "there is no option --").replace("you mean ", "you mean --")
    return problem if problem.startswith("--") else f"--{problem}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The most similar of some names as a question; empty if there is none."""
    section, _, last = name.rpartition(".")
    names = list(known)
    inside = {one.rpartition(".")[2]: one for one in names if one.rpartition(".")[0] == section}
    anywhere = {one.rpartition(".")[2]: one for one in reversed(names)}
    for ends, cutoff in ((inside, 0.6), (anywhere, 0.75)):
        close = get_close_matches(last, ends, n=1, cutoff=cutoff)
        if close:
            return f"did you mean {ends[close[0]]}?"
    return ""


def sections_of(options: Iterable[str]) -> list[str]:
    """The sections of some options, in order."""
    return list(dict.fromkeys(name.partition(".")[0] for name in options if "." in name))


def _flat(command: str, settings: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    """Dotted names and values; a mapping is a section only if options begin with its name."""
    options = options_of(command)
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if name in options or name not in sections_of(options):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _flat(command, value, f"{name}.")
        elif value is not None:
            yield name, value


def _no_section(command: str, name: str, value: Any) -> str | None:
    """What is wrong with a value in the place of a section's settings; it may be the name of another file of them."""
    if name not in sections_of(options_of(command)) or (isinstance(value, str) and Path(value).suffix):
        return None
    return f"{name} is {value!r}, expected its settings by name"


def _is_inside(name: str, options: Mapping[str, Option]) -> bool:
    """Whether it is a section, or part of the value of an option, such as model.optimizer.lr."""
    if name in sections_of(options):
        return True
    parents = (name[:i] for i, letter in enumerate(name) if letter == ".")
    return any("any" in options[parent].kinds for parent in parents if parent in options)


def _unknown(name: str, options: Mapping[str, Option]) -> str:
    section = name.partition(".")[0]
    asked = did_you_mean(name, [*options, *sections_of(options)])
    if asked:
        return f"there is no setting {name}: {asked}"
    inside = [one.removeprefix(f"{section}.") for one in options if one.startswith(f"{section}.") and section in name]
    if inside and section != "trainer":
        return f"there is no setting {name}; {section} has {', '.join(inside)}"
    return f"there is no setting {name}; --help lists them"


def _in_words(kinds: Sequence[str]) -> str:
    words = [_word(kind) for kind in kinds if kind != "null"]
    words += [_word("null")] if "null" in kinds else []
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _word(kind: str) -> str:
    if kind.startswith("="):
        return kind[1:]
    if kind.startswith("list:"):
        items = kind.removeprefix("list:").split(",")
        example = '"[0, 1]"' if items[0].startswith("int") else '"[one, two]"'
        return f"a list such as {example}"
    match = _BOUNDED.match(kind)
    if match is None:
        return _WORDS[kind]
    number, sign, bound = match.groups()
    return _NUMBERS[number] + {None: "", ">": f" above {bound}", ">=": f" of at least {bound}"}[sign]


def _fits(kind: str, value: Any) -> bool:
    """Whether a value is of a kind; a text also if it can be read as one of it."""
    if kind == "any":
        return True
    if kind == "str":
        return isinstance(value, (str, int, float))
    value = _parsed(value)
    if kind.startswith("="):
        return str(value) == kind[1:]
    if kind.startswith("list:"):
        items = kind.removeprefix("list:").split(",")
        return isinstance(value, (list, tuple)) and all(any(_fits(item, one) for item in items) for one in value)
    if kind == "bool":
        return isinstance(value, bool)
    return value is None if kind == "null" else _fits_number(kind, value)


def _fits_number(kind: str, value: Any) -> bool:
    match = _BOUNDED.match(kind)
    assert match is not None, kind
    number, sign, bound = match.groups()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if number == "int" and value != int(value if math.isfinite(value) else 0):
        return False
    return sign is None or (value > int(bound) if sign == ">" else value >= int(bound))


def _parsed(value: Any) -> Any:
    """The value that a text of the command line stands for; YAML 1.1 reads 1e-3 as a text."""
    if not isinstance(value, str):
        return value
    try:
        return float(value) if re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", value.strip(), re.I) else yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        return value

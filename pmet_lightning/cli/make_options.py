"""Makes ``run/options.json`` from the parsers of all commands: ``python -m pmet_lightning.cli.make_options``."""

from __future__ import annotations

import json
import operator
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import auto_cli, capture_parser

from pmet_lightning.cli.dispatch import FILE_COMMANDS, TRAINER_COMMANDS, function_of
from pmet_lightning.run.lightning_cli import run_command
from pmet_lightning.run.options import FILE
from pmet_lightning.run.trainer_arguments import ARGUMENTS

_SIGNS = {operator.gt: ">", operator.ge: ">="}
_PLAIN = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}


def make_options() -> dict[str, list[dict[str, Any]]]:
    """The options of every command, as the file has them."""
    made = {name: _options(_trainer_parser(name)) for name in TRAINER_COMMANDS}
    for name in FILE_COMMANDS:
        function = function_of(name)
        made[name] = _options(capture_parser(lambda f=function: auto_cli(f, args=[], as_positional=False)))
    return made


def write_options(path: Path = FILE) -> None:
    """Write the file, with one option in a line."""
    commands = [
        f" {json.dumps(command)}: [\n" + ",\n".join(f"  {json.dumps(o, ensure_ascii=False)}" for o in options) + "\n ]"
        for command, options in make_options().items()
    ]
    path.write_text("{\n" + ",\n".join(commands) + "\n}\n", encoding="utf-8")


def _trainer_parser(command: str) -> Any:
    parser = capture_parser(lambda: run_command(command, []))
    (inner,) = parser._subcommands_action._name_parser_map.values()
    return inner


def _options(parser: Any) -> list[dict[str, Any]]:
    """The options of a parser, except its own (help, configuration) and those linked to others."""
    options = []
    for action in parser._actions:
        if not hasattr(action, "_typehint") or action.default == "==SUPPRESS==":
            continue
        section, _, last = action.dest.rpartition(".")
        lightning = ARGUMENTS.get(last) if section == "trainer" else None
        options.append(
            {
                "name": action.dest,
                "kinds": list(dict.fromkeys(_kinds(action._typehint))),
                "default": json.loads(json.dumps(action.default, default=str)),
                "help": " ".join((action.help or "").split()) if lightning is None else lightning.text,
                "required": bool(action.required),
            }
        )
    return options


def _kinds(hint: Any) -> Iterator[str]:
    """The kinds of values that a type hint stands for."""
    origin = get_origin(hint)
    if hint in _PLAIN:
        yield _PLAIN[hint]
    elif origin in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _kinds(part)
    elif origin is Literal:
        yield from (f"={value}" for value in get_args(hint))
    elif origin in (list, Sequence) and get_args(hint):
        items = list(_kinds(get_args(hint)[0]))
        yield "any" if "any" in items else f"list:{','.join(items)}"
    elif hasattr(hint, "_restrictions") and len(hint._restrictions) == 1:
        sign, bound = hint._restrictions[0]
        yield f"{hint._type.__name__}{_SIGNS[sign]}{bound}"
    else:
        yield "any"


if __name__ == "__main__":
    write_options()

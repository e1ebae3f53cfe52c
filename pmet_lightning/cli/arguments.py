"""Checks a command line before anything heavy is imported: names, values, and the configurations that it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pmet_lightning.cli.foreign_keys import SIGNS
from pmet_lightning.run.options import UsageError, as_option, check_settings, options_of, problem_with
from pmet_lightning.utils.errors import first_line
from pmet_lightning.utils.resources import locate_config, shipped_configs

# Options of every command that parsers add themselves.
_CONFIG = ("--config", "-c")
_BARE = ("--print_config",)  # with an optional value after =


class Given(NamedTuple):
    """One option of a command line: its name without the dashes, and its text."""

    name: str
    text: str


def check_arguments(command: str, arguments: Sequence[str]) -> list[str]:
    """Check what follows a command.

    Args:
        command: The command.
        arguments: What follows it; configurations by path or shipped name.

    Returns:
        The arguments, with the names of shipped configurations replaced by their paths.

    Raises:
        FileNotFoundError: If there is no such configuration.
        UsageError: With the first problem, as one sentence.
    """
    given = _split(command, arguments)
    located: list[str] = []
    named: set[str] = set()
    for name, text in given:
        if name == "config":
            path = locate_config(text)
            settings = read_config(path)
            _check_ours(settings, text)
            check_settings(command, settings, Path(path).name)
            named |= _names(settings)
            located.append(f"--config={path}")
        elif f"--{name}" in _BARE:
            located.append(f"--{name}{text}")
            named.add(name)
        else:
            problem = problem_with(command, name, text)
            if problem is not None:
                raise UsageError(as_option(problem))
            named |= {name, name.partition(".")[0]} if "." in name else {name}
            located.append(f"--{name}={text}")
    _check_required(command, named, [text for name, text in given if name == "config"])
    return located


def read_config(path: str) -> Mapping[str, Any]:
    """The settings of a configuration.

    Raises:
        UsageError: If it is not YAML with settings by name, each given once; the message names the line.
    """
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_EachNameOnce)  # a safe loader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line}: not valid YAML ({error.problem})") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # other bytes, too many digits, brackets in brackets
        raise UsageError(f"{path}: not a text file with YAML ({first_line(error)})") from error
    if not isinstance(settings, Mapping):
        raise UsageError(f"{path}: expected settings by name, such as 'model:', found {type(settings).__name__}")
    return settings


def _check_ours(settings: Mapping[str, Any], path: str) -> None:
    """Refuse a file with settings of another program, and say how to convert it."""
    if any(key in settings for key in ("alg_name", *SIGNS)):
        raise UsageError(
            f"{Path(path).name}: settings of another program; pmet-lightning convert --settings {path} --out mine.yaml "
            "makes a configuration of them"
        )


class _EachNameOnce(yaml.SafeLoader):
    """YAML's safe loader would take the last of two settings of one name, and forget the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node.

        Raises:
            ConstructorError: If two of its keys are the same.
        """
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands here again", key.start_mark)
            seen.update([key.value] if isinstance(key, yaml.ScalarNode) else [])
        return super().construct_mapping(node, deep)


def _split(command: str, arguments: Sequence[str]) -> list[Given]:
    """Names and texts; what an option may lack is its value."""
    given: list[Given] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.partition("=")
        if name in _CONFIG:
            name = "--config"
        if not name.startswith("--") or name == "--":
            before = f" after --{given[-1].name} {given[-1].text}" if given else ""
            raise UsageError(f'unexpected {word!r}{before}; options begin with --, and lists are quoted: "[0, 1]"')
        if name in _BARE or name.endswith(".help"):
            text = f"={text}" if equals else ""
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(_without_value(command, name[2:]))
            text = rest.pop(0)
        given.append(Given(name[2:], text))
    return given


def _without_value(command: str, name: str) -> str:
    """What is wrong with an option that has no value."""
    option = options_of(command).get(name)
    if option is not None:
        return f"--{name} has no value, expected {option.expected()}"
    problem = None if name == "config" else problem_with(command, name, "")
    return f"--{name} has no value" if problem is None else as_option(problem)


def _names(settings: Mapping[str, Any]) -> set[str]:
    inner = {f"{name}.{key}" for name, part in settings.items() if isinstance(part, Mapping) for key in part}
    return {*settings, *inner}


def _check_required(command: str, named: set[str], configs: Sequence[str]) -> None:
    """Refuse a command line that lacks what must be given.

    A section that is given as a whole, as a file, is left to the parser.
    """
    missing = [f"--{name}" for name, option in options_of(command).items() if option.required and name not in named]
    missing = [name for name in missing if not (named & {name[2:].partition(".")[0]} and not _dotted(named, name))]
    if not missing or "print_config" in named:
        return
    problem = f"{command} needs {' and '.join(missing)}"
    if not configs and "." in missing[0]:
        problem += (
            f", which a configuration sets: {command} --config pmet.yaml, or another file; these ship: "
            f"{', '.join(shipped_configs())}"
        )
    elif configs:
        problem += f", which {' and '.join(Path(name).name for name in configs)} leaves to you"
    raise UsageError(problem)


def _dotted(named: set[str], option: str) -> bool:
    section = option[2:].partition(".")[0]
    return any(name.startswith(f"{section}.") for name in named)

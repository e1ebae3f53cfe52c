"""The help of a command, from the file of options: no parser is built for it."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterable

from pmet_lightning.run.options import Option, UsageError, options_of, sections_of
from pmet_lightning.run.trainer_arguments import ARGUMENTS

_SECTIONS = {
    "model": "the model, and the search for target vectors",
    "data": "the edits",
    "moments": "second moments of the keys",
    "spread": "the closed-form update of the weights",
    "drift": "what the edits do to other text",
    "trainer": "devices and the run folder",
}
_USUAL = ("run_dir", "resume", "accelerator", "devices", "enable_progress_bar")  # of the trainer
_INDENT = 6


def help_of(command: str, text: str, section: str | None = None) -> str:
    """The help of a command.

    Args:
        command: The command.
        text: What it does.
        section: A section to show alone, with all of its options; by default all that are usual.

    Raises:
        UsageError: If there is no such section.
    """
    options = options_of(command)
    known = sorted(sections_of(options), key=lambda name: [*_SECTIONS, name].index(name))
    if section is not None and section not in known:
        raise UsageError(
            f"--help={section}: expected one of {', '.join(known) or 'none: this command has no sections'}"
        )
    config = " [--config FILE]" if known or "methods" in options else ""
    lines = [f"usage: pmet-lightning {command}{config} [options]", "", *textwrap.wrap(text, _width()), ""]
    if section is not None:
        return "\n".join([*lines, *_section(section, options.values(), everything=True)])
    loose = [option for option in options.values() if "." not in option.name]
    lines += [line for option in loose if "model" not in known for line in _entry(option)]
    for name in known:
        lines += [*_section(name, options.values(), everything=False), ""]
    if "model" in known:
        lines += ["other options", *(line for option in loose for line in _entry(option))]
        lines += _wrapped("--config FILE", "A configuration; the options of the command line win over it.")
        lines += _wrapped("--print_config", "Show all settings as a configuration, and end.")
        lines += _wrapped("--help=SECTION", f"The options of one section: {', '.join(known)}; --help=trainer lists "
                          "those of Lightning's Trainer, and says which are refused and why.")  # fmt: skip
    return "\n".join(lines).rstrip()


def _section(name: str, options: Iterable[Option], everything: bool) -> list[str]:
    mine = [option for option in options if option.name.startswith(f"{name}.")]
    if name == "trainer":
        mine.sort(key=lambda option: not _is_usual(option))
    shown = [option for option in mine if name != "trainer" or _is_usual(option) or (everything and _is_shown(option))]
    lines = [f"{name}: {_SECTIONS.get(name, name)}", *(line for option in shown for line in _entry(option))]
    if everything and name == "trainer":
        refused = {last: one.text for last, one in ARGUMENTS.items() if not one.shown and one.allowed is not None}
        lines += ["", "Arguments of Lightning's Trainer that are refused here:"]
        lines += [line for last, text in refused.items() for line in _wrapped(f"--trainer.{last}", text)]
    return lines


def _is_usual(option: Option) -> bool:
    return option.name.partition(".")[2] in _USUAL


def _is_shown(option: Option) -> bool:
    argument = ARGUMENTS.get(option.name.partition(".")[2])
    return argument is None or argument.shown


def _entry(option: Option) -> list[str]:
    """One option: its name and values, and below them what it means."""
    value = "required" if option.required else f"default {_default(option)}"
    kinds = "" if "any" in option.kinds else f"{option.expected()}; "
    return _wrapped(f"--{option.name}", f"{option.help} ({kinds}{value})")


def _default(option: Option) -> str:
    value = option.default
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{name}={given}" for name, given in value.get("init_args", {}).items())
        return f"{value['class_path']}({arguments})"
    return value if isinstance(value, str) else json.dumps(value)


def _wrapped(name: str, text: str) -> list[str]:
    indent = " " * _INDENT
    return [f"  {name}", *textwrap.wrap(text, _width(), initial_indent=indent, subsequent_indent=indent)]


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 110)

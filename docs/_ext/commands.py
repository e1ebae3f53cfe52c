"""Sphinx directives that document the command line from its own parsers: ``settings`` and ``commands``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from docutils import nodes
from jsonargparse import auto_cli, capture_parser
from lightning.pytorch.cli import LightningArgumentParser
from sphinx.util.docutils import SphinxDirective

from pmet_lightning.baselines.finetuning import FineTuning
from pmet_lightning.cli.dispatch import FILE_COMMANDS, USAGE, function_of
from pmet_lightning.run.settings import SECTIONS, section_parser
from pmet_lightning.run.trainer import EditTrainer

_MODULES = re.compile(r"\b(?:[a-z_]+\.)+(?=[A-Z])|\btyping\.|<class '|'>")
_REQUIRED = ("model.model_name", "data.path")  # jsonargparse does not mark required arguments of classes


@dataclass(frozen=True)
class Option:
    """One option of the command line."""

    name: str
    type: str
    default: str
    text: str


class _Generated(SphinxDirective):
    """Shows Markdown generated when the build began: later, autodoc has replaced defaults by texts."""

    markdown = ""

    def run(self) -> list[nodes.Node]:
        """Parse the Markdown to nodes."""
        return self.parse_text_to_nodes(self.markdown, allow_section_headings=True)


class Settings(_Generated):
    """The settings of a configuration, section by section."""


class Commands(_Generated):
    """The commands that are functions, with their options."""


def settings_markdown() -> str:
    """A table of the settings of each section."""
    options = _options(section_parser())
    tables = {name: [o for o in options if o.name.startswith(f"{name}.")] for name in SECTIONS}
    tuning = LightningArgumentParser()
    tuning.add_lightning_class_args(FineTuning, "model")
    tables["model (command finetune)"] = _options(tuning)
    parts = [f"## {title}\n\n{_table(rows)}" for title, rows in tables.items()]
    return "\n\n".join(
        [*parts, f"## trainer\n\nAll arguments of Lightning's Trainer, and\n\n{_table(_trainer_options())}"]
    )


def commands_markdown() -> str:
    """A section of each command."""
    parts = [f"```text\n{USAGE}\n```"]
    for command in FILE_COMMANDS:
        function = function_of(command)
        parser = capture_parser(lambda f=function: auto_cli(f, args=[], as_positional=False))
        description = (inspect.getdoc(function) or "").split("\n\nArgs:")[0]
        parts.append(f"## {command}\n\n{_escaped(description)}\n\n{_table(_options(parser))}")
    return "\n\n".join(parts)


def _options(parser: Any) -> list[Option]:
    """The options of a parser, except its own (help, configuration) and those linked to others."""
    actions = [a for a in parser._actions if hasattr(a, "_typehint") and a.default != "==SUPPRESS=="]
    return [
        Option(
            action.dest,
            _MODULES.sub("", str(action._typehint)),
            "" if action.required or action.dest in _REQUIRED else _default(action.default),
            action.help or "",
        )
        for action in actions
    ]


def _trainer_options() -> list[Option]:
    """The options that the trainer adds to Lightning's, from its docstring."""
    block = (inspect.getdoc(EditTrainer) or "").split("Args:\n")[1].split("\n\nRaises:")[0]
    texts = {name: " ".join(text.split()) for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", block, re.M)}
    parameters = inspect.signature(EditTrainer).parameters
    return [
        Option(f"trainer.{name}", str(parameters[name].annotation), _default(parameters[name].default), text)
        for name, text in texts.items()
        if name != "kwargs"
    ]


def _default(value: Any) -> str:
    """A default as written in a configuration."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{name}={given}" for name, given in value.get("init_args", {}).items())
        return f"{value['class_path']}({arguments})"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _table(options: Iterable[Option]) -> str:
    lines = ["| option | type | default | |", "|---|---|---|---|"]
    for option in options:
        kind, default = f"`{option.type}`".replace("|", "\\|"), f"`{option.default}`" if option.default else "required"
        lines.append(f"| `--{option.name}` | {kind} | {default} | {_escaped(option.text)} |".replace("\n", " "))
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Docstring text as Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([|*_{}<>$\[\]])", r"\\\1", p) for p in parts)


def setup(app: Any) -> dict[str, Any]:
    """Generate the Markdown from the parsers, and register the directives."""
    Settings.markdown, Commands.markdown = settings_markdown(), commands_markdown()
    app.add_directive("settings", Settings)
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

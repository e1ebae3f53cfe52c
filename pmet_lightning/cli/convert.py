"""The command ``convert``: reads settings of EasyEdit, MEMIT, ROME, AlphaEdit or PMET's authors, and writes ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pmet_lightning.cli.arguments import read_config
from pmet_lightning.cli.foreign_keys import (
    CHANGED,
    FIXED,
    METHODS,
    RENAMED,
    SIGNS,
    UNREAD,
    WITHOUT,
    MethodName,
)
from pmet_lightning.run.options import Option, UsageError, did_you_mean, options_of
from pmet_lightning.utils.files import atomic_path, check_new_file

log = logging.getLogger(__name__)

_WIDTH = 52  # of a setting; its comment follows


class Converted(NamedTuple):
    """Settings of another program in ours.

    Attributes:
        method: The method they are for.
        settings: By dotted name, each value with the key of theirs that it comes from.
        dropped: Keys of theirs without a counterpart, and why.
        differing: Those of them that say something that is not done here.
    """

    method: MethodName
    settings: dict[str, tuple[Any, str]]
    dropped: dict[str, str]
    differing: list[str]


def convert(settings: str, out: str, method: MethodName | None = None) -> None:
    """Write a configuration from a settings file of EasyEdit, MEMIT, ROME, AlphaEdit or PMET's authors.

    A comment beside each setting names the key of theirs that it comes from; keys without a counterpart are listed at
    the end, each with the reason.

    Args:
        settings: Their file, YAML or JSON, such as hparams/PMET/llama-7b.yaml.
        out: The configuration to write, such as mine.yaml; must not exist.
        method: The method that the settings are for; by default what the file says (alg_name), or what its keys show.

    Raises:
        FileNotFoundError: If there is no such file.
        FileExistsError: If ``out`` exists.
        UsageError: If the file is unreadable or for another method, or a value is not valid; the message names the
            file and the key.
    """
    check_new_file(out, "--out")
    name = Path(settings).name
    converted = convert_settings(read_settings(settings), name, method)
    with atomic_path(out) as temporary:
        temporary.write_text(as_yaml(converted, name, Path(out).name), encoding="utf-8")
    for key in converted.differing:
        log.warning("%s: %s %s", name, key, converted.dropped[key])
    model = "" if "model.model_name" in converted.settings else " --model.model_name FOLDER"
    log.info(
        "%s (%s): %d keys without a counterpart, listed in the file", name, converted.method, len(converted.dropped)
    )
    log.info("the configuration is in %s; next: fit --config %s%s --data.path facts.json", out, out, model)


def read_settings(path: str) -> Mapping[str, Any]:
    """The keys and values of a settings file of another program, YAML or JSON.

    Raises:
        FileNotFoundError: If there is no such file.
        UsageError: If it has no settings by name.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"--settings {path}: no such file; expected a YAML or JSON file such as those in hparams/"
        )
    if file.suffix != ".json":
        return read_config(str(file))
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file with JSON ({error.reason})") from error
    if not isinstance(found, Mapping):
        raise UsageError(f"{path}: expected settings by name, found {type(found).__name__}")
    return found


def convert_settings(theirs: Mapping[str, Any], name: str, method: MethodName | None = None) -> Converted:
    """Find what each key of another program is called here.

    Args:
        theirs: Their keys and values.
        name: The name of their file, for errors.
        method: The method that they are for; by default the one they name or show.

    Raises:
        UsageError: If they are for another method, or a value is not valid; the message names the key.
    """
    chosen = method or _method_of(theirs, name)
    settings: dict[str, tuple[Any, str]] = {
        setting: (value, f"the method {chosen}") for setting, value in METHODS[chosen].items()
    }
    dropped, differing = dict[str, str](), list[str]()
    unread = UNREAD.get(chosen, {})
    for named, value in theirs.items():
        key = " ".join(str(named).split())  # one line of a comment
        reason = unread.get(key)
        if key == "alg_name" or value is None:
            continue
        if reason is None and key in (*RENAMED, *CHANGED):
            settings |= {setting: (ours, key) for setting, ours in _ours(key, value, name).items()}
            continue
        dropped[key] = f"({json.dumps(value, default=str)}): {reason or _why_dropped(key)}"
        differs = value != FIXED[key][0] if key in FIXED else not reason and key not in WITHOUT
        differing += [key] if differs else []
    return Converted(chosen, settings, dropped, differing)


def as_yaml(converted: Converted, name: str, out: str) -> str:
    """The text of a configuration, with a comment beside every setting."""
    settings = converted.settings
    model = "" if "model.model_name" in settings else " --model.model_name FOLDER"
    lines = [
        f"# {name} ({converted.method}), as settings of pmet-lightning; what follows a # is the key it comes from.",
        f"# pmet-lightning fit --config {out}{model} --data.path facts.json",
    ]
    for section in ("model", "data", "moments", "spread"):
        written = list(_section(section, settings))
        lines += ["", f"{section}:", *written] if written else []
    if converted.dropped:
        lines += ["", f"# Keys of {name} that have no counterpart:"]
        lines += [f"#   {key} {text}" for key, text in converted.dropped.items()]
    return "\n".join(lines) + "\n"


def _section(section: str, settings: Mapping[str, tuple[Any, str]]) -> Iterator[str]:
    for setting, (value, origin) in settings.items():
        first, _, last = setting.partition(".")
        if first == section:
            yield f"{f'  {last}: {json.dumps(value, ensure_ascii=False)}':{_WIDTH}}  # {origin}"


def _method_of(theirs: Mapping[str, Any], name: str) -> MethodName:
    """The method that settings name, or else show by their keys."""
    known: dict[str, MethodName] = {method.lower(): method for method in get_args(MethodName)}
    stated = theirs.get("alg_name")
    if stated is not None and str(stated).lower() in known:
        return known[str(stated).lower()]
    if stated is not None:
        raise UsageError(
            f"{name}: alg_name is {stated}, expected one of {', '.join(known.values())}; fine-tuning is the command "
            "finetune, and asking with the fact in the prompt is retrieve"
        )
    shown = next((method for key, method in SIGNS.items() if key in theirs), None)
    if shown is None:
        raise UsageError(
            f"{name}: it has neither alg_name nor a key of {', '.join(known.values())} (found "
            f"{', '.join(map(str, theirs)) or 'no keys'}); if it is for one of them, say so with --method"
        )
    return shown


def _ours(key: str, value: Any, name: str) -> dict[str, Any]:
    """The settings that one key of theirs becomes."""
    kinds = CHANGED[key][0] if key in CHANGED else options_of("fit")[RENAMED[key]].kinds
    plain = _as_number(value) if any(kind.startswith(("int", "float")) for kind in kinds) else value
    problem = Option(key, kinds, None, "").problem(plain)
    if problem is not None:
        raise UsageError(f"{name}: {problem}")
    try:
        return CHANGED[key][1](plain) if key in CHANGED else {RENAMED[key]: plain}
    except ValueError as error:
        raise UsageError(f"{name}: {key} is {value}, expected {error}") from error


def _as_number(value: Any) -> Any:
    """A number where it is one: YAML 1.1 reads 5e-1 as a text, and 1.0e+5 is a whole number."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _why_dropped(key: str) -> str:
    if key in FIXED:
        return FIXED[key][1]
    if key in WITHOUT:
        return WITHOUT[key]
    close = did_you_mean(key, [*RENAMED, *CHANGED, *FIXED])
    return f"not known here{f'; {close}' if close else ''}"

"""The sections of a configuration: names and checks of their settings, and the objects that they describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser

from pmet_lightning.data.datamodule import EditDataModule
from pmet_lightning.moments.second_moments import SecondMoments
from pmet_lightning.run.options import UsageError, check_settings
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.resources import locate_config
from pmet_lightning.write.drift import Drift
from pmet_lightning.write.weight_spread import WeightSpread

_LINKED = ("chat", "join", "trust_remote_code")  # settings of the model that the data need too


def add_shared_sections(parser: LightningArgumentParser) -> None:
    """Add the section ``drift``, and link the values that two sections share."""
    parser.add_lightning_class_args(Drift, "drift")
    parser.link_arguments("model.model_name", "data.tokenizer")
    for name in _LINKED:
        parser.link_arguments(f"model.{name}", f"data.{name}")


def add_editing_sections(parser: LightningArgumentParser) -> None:
    """Add the sections ``moments`` and ``spread`` too."""
    parser.add_lightning_class_args(SecondMoments, "moments")
    parser.add_lightning_class_args(WeightSpread, "spread")
    add_shared_sections(parser)
    parser.link_arguments("spread.write", "moments.write")


SECTIONS = ("model", "data", "moments", "spread", "drift")
_OTHERS = ("seed_everything", "trainer")  # sections of a configuration that only the command line has
# Passed to edit(), or linked to others.
_NOT_TAKEN = {"data": ("path", "stream", "stream_wait", "tokenizer", *_LINKED), "moments": ("write",)}
_PLACEHOLDER = "facts"


@dataclass(frozen=True)
class EditObjects:
    """The objects that the settings describe.

    Attributes:
        module: Finds target vectors.
        moments: Provides the second moments.
        spread: Writes the weights.
        drift: Measures plain text.
        data: Arguments of every data module.
    """

    module: TargetOptimizer
    moments: SecondMoments
    spread: WeightSpread
    drift: Drift
    data: dict[str, Any]


def make_objects(model_name: str, sections: Mapping[str, Mapping[str, Any]]) -> EditObjects:
    """Check settings and make the objects that they describe.

    Args:
        model_name: Name of the model.
        sections: Settings by section, as in a configuration.

    Raises:
        ValueError: If there is no such setting, or a value is not valid for it.
    """
    parser = section_parser()
    settings = {name: _plain(section) for name, section in sections.items()}
    settings["model"] = {**settings.get("model", {}), "model_name": model_name}
    settings["data"] = {"path": _PLACEHOLDER, **settings.get("data", {})}
    try:
        check_settings("fit", settings, options=True)
        parsed = parser.parse_object(settings)
    except (ArgumentError, TypeError, UsageError) as error:
        raise ValueError(
            f"Editor: {error}\n(settings of the section 'model' are keyword arguments, the other sections are dicts)"
        ) from error
    if parsed.data.stream:
        raise ValueError("Editor: data.stream is true; a stream is for the command fit, give edit() lists of facts")
    data = {name: value for name, value in vars(parsed.data).items() if name != "tokenizer"}
    made = (parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes)(parsed)
    return EditObjects(made.model, made.moments, made.spread, made.drift, data)


def _plain(value: Any) -> Any:
    """Settings as a configuration holds them: paths as texts, arrays and ranges as lists, numbers of NumPy plain."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return value.tolist() if hasattr(value, "dtype") and hasattr(value, "tolist") else value


def read_sections(config: str) -> dict[str, dict[str, Any]]:
    """The sections of a configuration, with defaults for what it does not set; without a model, an empty model_name.

    Args:
        config: A path, or the name of a shipped one.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not a configuration of an edit run.
    """
    parser = section_parser()
    parser.set_defaults({"model.model_name": "", "data.path": _PLACEHOLDER})  # a configuration may leave them open
    for name in _OTHERS:
        parser.add_argument(f"--{name}", type=object)
    try:
        found = parser.parse_path(locate_config(config), defaults=True).as_dict()
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{config}: {error}") from error
    return {
        section: {name: value for name, value in found[section].items() if name not in _NOT_TAKEN.get(section, ())}
        for section in SECTIONS
    }


def section_parser() -> LightningArgumentParser:
    """A parser of all sections, linked as on the command line."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(TargetOptimizer, "model")
    parser.add_lightning_class_args(EditDataModule, "data")
    add_editing_sections(parser)
    return parser

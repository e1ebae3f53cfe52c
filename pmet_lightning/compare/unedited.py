"""The unedited model is asked once what several runs of a comparison would ask it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.cli import LightningCLI

from pmet_lightning.evaluation.editable import CleanEvaluation, EditableModel
from pmet_lightning.utils.callbacks import find_callback
from pmet_lightning.write.drift import Drift

_TEXT = ("text", "text_subset", "rows", "length", "seed")  # what a measurement of text depends on


class UneditedModel:
    """What the unedited model has answered in the last run that asked it.

    Only one evaluation is kept: the runs that would ask the same follow each other
    (:func:`~pmet_lightning.compare.plan.plan_runs`).
    """

    def __init__(self) -> None:
        self._depends = ""
        self._found: CleanEvaluation | None = None
        self._drift: Drift | None = None

    def fit(self, cli: LightningCLI) -> None:
        """Run a fit, without the evaluation before the first edit if that is known.

        Args:
            cli: Trainer, module and data of the fit.
        """
        depends, drift = evaluation_settings(cli), find_callback(cli.trainer, Drift)
        if self._found is not None and depends == self._depends:
            cli.trainer.num_sanity_val_steps = 0
            cli.model.use_before(self._found)
            if drift is not None and self._drift is not None:
                drift.use_before(self._drift)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        self._depends, self._found, self._drift = depends, cli.model.clean_evaluation, drift


def evaluation_settings(cli: LightningCLI) -> str:
    """Everything that the unedited model's answers depend on, to the last bit.

    Args:
        cli: Trainer, module and data of a fit.
    """
    config: dict[str, dict[str, Any]] = cli.config.as_dict()
    model = {name: config["model"][name] for name in inspect.signature(EditableModel).parameters}
    if model["dtype"] == "float32" and model["quantize"] is None:
        model = _without(model, "layers", "keep_float32")
    else:  # some methods hold the weights of their layers in a precision of their own
        model["method"] = type(cli.model).__name__
    data, trainer = _without(config["data"], "edit_batch"), _without(config["trainer"], "run_dir")
    drift = {name: config["drift"][name] for name in _TEXT}
    return json.dumps([model, data, trainer, drift], default=str)


def _without(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}

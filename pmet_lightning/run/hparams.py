"""The settings of a run under their command-line names: one list for loggers and the patch's manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L

from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.moments.second_moments import SecondMoments
from pmet_lightning.utils.callbacks import all_edits, find_callback
from pmet_lightning.write.drift import Drift
from pmet_lightning.write.weight_spread import WeightSpread

# Settings that affect only time, memory and where files are kept; and those that are linked to others.
_WITHOUT_EFFECT = {
    *(f"model.{name}" for name in ("padding_side", "tokens_per_batch", "targets_folder", "micro_batch")),
    *(f"model.{name}" for name in ("suffix_only", "compile_ffn", "device_map", "attn_implementation")),
    *(f"data.{name}" for name in ("tokenizer", "chat", "join", "evaluation_batch", "stream_wait")),
    *(f"{section}.trust_remote_code" for section in ("model", "data")),
    *(f"moments.{name}" for name in ("folder", "save_every", "write")),
    *(f"drift.{name}" for name in ("warn_from", "damaged_from", "fail_if_damaged")),
}
_SAMPLED = {f"model.{name}" for name in ("context_count", "context_length", "seed")}  # of contexts that are not given
_COLLECTED = {f"moments.{name}" for name in ("corpus", "corpus_subset", "samples", "tolerance", "length", "seed")}
Value = bool | int | float | str


def collect_hparams(trainer: L.Trainer, module: EditableModel) -> dict[str, Value]:
    """The settings that decide the result of a run, as plain values; null ones are left out."""
    owners = {
        "model": module,
        "data": getattr(trainer, "datamodule", None),
        "moments": find_callback(trainer, SecondMoments),
        "spread": find_callback(trainer, WeightSpread),
        "drift": find_callback(trainer, Drift),
    }
    found = {name: value for section, owner in owners.items() for name, value in settings_of(section, owner).items()}
    found |= {
        "model.layers": module.layers,
        "model.dtype": str(next(module.model.parameters()).dtype).removeprefix("torch."),
        **_optimizer(module),
        "data.edits": len(all_edits(trainer)) or None,
    }
    if found.get("moments.given") is not None:
        found = {name: value for name, value in found.items() if name not in _COLLECTED}
    if found.get("model.contexts") is not None:
        found = {name: value for name, value in found.items() if name not in _SAMPLED}
        found["model.contexts"] = len(found["model.contexts"])
    return {name: _plain(value) for name, value in found.items() if value is not None}


def settings_of(section: str, owner: Any) -> dict[str, Any]:
    """The settings that an object was made with, under their command-line names; empty for ``None``.

    Args:
        section: The section of a configuration that describes it.
        owner: Object with ``hparams``, as Lightning's ``save_hyperparameters`` sets them.
    """
    if owner is None:
        return {}
    named = {f"{section}.{name}": value for name, value in owner.hparams.items() if not name.startswith("_")}
    return {name: value for name, value in named.items() if name not in _WITHOUT_EFFECT}


def hparams_summaries(settings: Mapping[str, Value], tags: Sequence[str]) -> tuple[Any, Any, Any]:
    """Summaries for TensorBoard's HParams tab: the experiment, the start of a run, its successful end.

    Args:
        settings: Settings of the run.
        tags: Scalars that runs are compared by; the run logs them itself.
    """
    from torch.utils.tensorboard.summary import hparams

    found: tuple[Any, Any, Any] = hparams(dict(settings), dict.fromkeys(tags, 0.0))
    return found


def _optimizer(module: EditableModel) -> dict[str, Any]:
    optimizer = module.optimizers().optimizer  # type: ignore[union-attr]
    return {"model.optimizer": type(optimizer).__name__, "model.lr": optimizer.param_groups[0]["lr"]}


def _plain(value: Any) -> Value:
    """The value as a table shows it; the bounded number types of the command line become plain ones."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    return str(value)

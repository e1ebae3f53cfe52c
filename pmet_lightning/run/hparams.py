"""The settings of a run under their names on the command line, and TensorBoard's form of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L

from pmet_lightning.baselines.finetuning import FineTuning
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.moments.second_moments import SecondMoments
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.callbacks import all_edits, find_callback
from pmet_lightning.write.drift import Drift
from pmet_lightning.write.weight_spread import WeightSpread

_SAMPLED = ("context_count", "context_length", "seed")  # settings of contexts that are not given
Value = bool | int | float | str


def hyper_parameters(trainer: L.Trainer, module: EditableModel) -> dict[str, Value]:
    """What decides the result of a run, one plain value each; what is null is left out."""
    data = getattr(trainer, "datamodule", None)
    spread, moments = find_callback(trainer, WeightSpread), find_callback(trainer, SecondMoments)
    drift = find_callback(trainer, Drift)
    found: dict[str, Any] = {
        "model.model_name": module.model_name,
        "model.layers": module.layers,
        "model.dtype": str(next(module.model.parameters()).dtype).removeprefix("torch."),
        "model.keep_float32": module.keep_float32,
        "model.chat": module.chat,
        "model.patch": module.patch,
        **_optimizer(module),
        **{f"data.{name}": getattr(data, name, None) for name in ("path", "skip", "limit", "shuffle", "edit_batch")},
        "data.edits": len(all_edits(trainer)) or None,
    }
    if isinstance(module, TargetOptimizer):
        found |= _targets(module)
    if isinstance(module, FineTuning):
        names = ("epochs", "batch", "loss_tolerance", "max_change", "seed")
        found |= {f"model.{name}": getattr(module, name) for name in names}
    if spread is not None:
        found |= {f"spread.{name}": getattr(spread, name) for name in ("lam", "rule", "null_space", "protect_past")}
        found["spread.write"] = "+".join(spread.sites)
    if moments is not None:
        found |= _moments(moments)
    if drift is not None and drift.limited:
        found |= {f"drift.{name}": getattr(drift, name) for name in ("max_perplexity", "max_growth", "on_limit")}
    return {name: _plain(value) for name, value in found.items() if value is not None}


def session(settings: Mapping[str, Value], tags: Sequence[str]) -> tuple[Any, Any, Any]:
    """What TensorBoard's HParams tab reads: the experiment, the beginning of a run, its good end.

    Args:
        settings: The run's.
        tags: Scalars that runs are compared by; the run logs them itself.
    """
    from torch.utils.tensorboard.summary import hparams

    found: tuple[Any, Any, Any] = hparams(dict(settings), dict.fromkeys(tags, 0.0))
    return found


def _targets(module: TargetOptimizer) -> dict[str, Any]:
    rules = module.rules
    return {
        "model.optimise": "+".join(module.sites_optimised),
        "model.target_value": "realised" if rules.realised else "stored",
        "model.steps": rules.steps,
        "model.clamp": rules.clamp,
        "model.nll_factor": rules.nll,
        "model.kl_factor": rules.kl,
        "model.norm_factor": rules.norm,
        "model.loss_tolerance": rules.loss_tolerance,
        "model.stop_at_argmax": rules.argmax_rule,
        "model.contexts": len(module.contexts),
        **({} if module.given_contexts else {f"model.{name}": getattr(module, name) for name in _SAMPLED}),
    }


def _moments(moments: SecondMoments) -> dict[str, Any]:
    """Where the second moments come from: made elsewhere, or collected from a corpus."""
    if moments.given is not None:
        return {"moments.given": moments.given}
    settings = moments.settings
    return {
        "moments.corpus": settings.corpus,
        "moments.corpus_subset": settings.subset,
        "moments.samples": str(settings.samples or "auto"),  # a column of the table is of one kind
        "moments.tolerance": settings.tolerance if settings.samples is None else None,
        "moments.length": settings.length,
        "moments.seed": settings.seed,
    }


def _optimizer(module: EditableModel) -> dict[str, Any]:
    optimizer = module.optimizers().optimizer  # type: ignore[union-attr]
    return {"model.optimizer": type(optimizer).__name__, "model.lr": optimizer.param_groups[0]["lr"]}


def _plain(value: Any) -> Value:
    """As a table shows it; the bounded numbers of the command line become plain ones."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    return str(value)

"""What the settings of other programs are called here: of EasyEdit, MEMIT, ROME, AlphaEdit and PMET's authors.

They share most names, because each of them began as a copy of another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

MethodName = Literal["PMET", "MEMIT", "AlphaEdit", "ROME"]

_MEMIT = {"model.optimize": "hidden", "model.stop_at_argmax": False, "spread.rule": "even"}
# What a method is, in settings of ours.
METHODS: Mapping[MethodName, Mapping[str, Any]] = {
    "PMET": {"model.optimize": "attn+ffn", "model.target_value": "stored", "spread.rule": "sqrt"},
    "MEMIT": _MEMIT,
    "AlphaEdit": {**_MEMIT, "spread.null_space": 0.01, "spread.protect_past": True},
    # ROME meets its one edit exactly, which a λ near zero approaches.
    "ROME": {"model.optimize": "ffn", "model.target_value": "stored", "model.stop_at_argmax": False, "spread.lam": 1},
}
# Keys by which a file without a name of its method is recognized, the surest first.
SIGNS: Mapping[str, MethodName] = {
    "nullspace_threshold": "AlphaEdit",
    "nll_loss_factor": "PMET",
    "mom2_update_weight": "MEMIT",
    "context_template_length_params": "ROME",
}

# Keys that only have another name here.
RENAMED = {
    "model_name": "model.model_name",
    "layers": "model.layers",
    "v_num_grad_steps": "model.steps",
    "clamp_norm_factor": "model.clamp",
    "nll_loss_factor": "model.nll_factor",
    "kl_factor": "model.kl_factor",
    "v_weight_decay": "model.norm_factor",
    "batch_size": "data.edit_batch",
    "mom2_n_samples": "moments.samples",
    "mom2_update_weight": "spread.lam",
}

_CORPORA = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
}


def _optimizer(value: Any) -> dict[str, Any]:
    return {"model.optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": value}}}


def _corpus(value: Any) -> dict[str, Any]:
    corpus, subset = _CORPORA.get(value, (value, None))
    return {"moments.corpus": corpus, "moments.corpus_subset": subset}


def _contexts(value: Any) -> dict[str, Any]:
    """Pairs of a length and a number; contexts here are of one length, the longest of theirs."""
    try:
        lengths, counts = zip(*value, strict=True)
        return {"model.context_count": sum(counts), "model.context_length": max(lengths)}
    except (TypeError, ValueError) as error:
        raise ValueError("pairs of a length and a number, such as [[5, 10], [10, 10]]") from error


def _written(value: Any) -> dict[str, Any]:
    return {"spread.write": "attn+ffn" if any("attn" in template for template in value) else "ffn"}


# Keys whose value has another form here: kinds of the values they may have, and what becomes of one (a ValueError says
# what was expected).
CHANGED: Mapping[str, tuple[tuple[str, ...], Callable[[Any], dict[str, Any]]]] = {
    "v_lr": (("float>0",), _optimizer),
    "mom2_dataset": (("str",), _corpus),
    "context_template_length_params": (("any",), _contexts),
    "rewrite_module_tmps": (("list:str",), _written),
    "fp16": (("bool",), lambda value: {"model.dtype": "float16" if value else "float32"}),
    "model_parallel": (("bool",), lambda value: {"model.device_map": "auto"} if value else {}),
}

# Keys with one value that is always so here; any other would mean another computation.
FIXED: Mapping[str, tuple[Any, str]] = {
    "fact_token": ("subject_last", "edits are always made at the subject's last token"),
    "layer_selection": ("all", "all of the layers are written"),
    "mom2_adjustment": (True, "second moments are always used"),
}

_MODULES = "found by the model's family; for one that is not listed, model.architecture"
_EVALUATION = "every evaluation has teacher forcing and free generation"
# Keys that have no counterpart here, and why.
WITHOUT = {
    "v_loss_layer": "the loss is always that of the model's own output",
    "rewrite_module_tmp": _MODULES,
    "layer_module_tmp": _MODULES,
    "mlp_module_tmp": _MODULES,
    "attn_module_tmp": _MODULES,
    "ln_f_module": "the model's own logits are used",
    "lm_head_module": "the model's own logits are used",
    "mom2_dtype": "moments are summed in float64",
    "stats_dir": "moments.folder caches ours; moments.given takes a folder of their .npz files",
    "device": "trainer.accelerator and trainer.devices say where a run takes place",
    "max_length": "no prompt is cut",
    "P_loc": "the null space is computed from the second moments",
    "nullspace_threshold": "it bounds eigenvalues; here spread.null_space bounds their share of the second moment",
    "L2": "it multiplies the identity; spread.lam counts preserved keys in the null space too: choose it anew",
    "evaluation_type": _EVALUATION,
    "evaluation_framework": _EVALUATION,
    "metric_type": _EVALUATION,
    "context_type": "model.chat asks in the chat template",
    "api_key": "no answer is sent to another model",
}
# Keys that a method has in its files and does not read.
UNREAD: Mapping[MethodName, Mapping[str, str]] = {
    "AlphaEdit": {"mom2_update_weight": "AlphaEdit does not read it; spread.lam is the default"},
    "ROME": {"mom2_update_weight": "ROME does not read it"},
}

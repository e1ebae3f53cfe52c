"""Forward passes of the language model that compute only the logits that are needed, or end at a hook.

Legend: R = rows, K = labels of a row, V = vocabulary.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pmet_lightning.data.token_rows import RowBatch
from pmet_lightning.model.fsdp import reshard_on_exit
from pmet_lightning.model.hooks import narrow_input

if TYPE_CHECKING:
    from pmet_lightning.model.kv_prefix import Prefix


MAX_LOGITS = 2**26  # 256 MiB in float32; a softmax takes as much again


def most_logit_rows(model: nn.Module) -> int:
    """How many rows of logits, each of the size of the vocabulary, a pass makes at most."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return max(1, MAX_LOGITS // int(head.weight.shape[0]))


def label_logits(
    model: nn.Module, rows: RowBatch, prefix: Prefix | None = None, positions: Tensor | None = None
) -> Tensor:
    """Logits at the labels only: the vocabulary head is most of a small model's work.

    Args:
        model: The language model.
        rows: The rows to run.
        prefix: Cached tokens that precede the rows, if any.
        positions: Tokens whose logits are wanted, counted over all tokens of all rows; by default those that predict
            the labels, shape [R, K].

    Returns:
        A vector of V logits for each position, in the model's dtype.
    """
    positions = rows.label_positions() if positions is None else positions
    with narrow_input(model.get_output_embeddings(), positions):  # type: ignore[operator]
        logits: Tensor = model(**model_inputs(model, rows, prefix)).logits
        return logits.to(rows.input_ids.device)


def run_to(model: nn.Module, rows: RowBatch, prefix: Prefix | None = None) -> None:
    """Run the layers, without the vocabulary head, for their hooks."""
    body: nn.Module = model.base_model  # type: ignore[assignment]
    with reshard_on_exit(body):
        body(**model_inputs(body, rows, prefix))


def model_inputs(
    model: nn.Module, rows: RowBatch, prefix: Prefix | None = None, *, masked: bool = True, keep: bool = False
) -> dict[str, Any]:
    """Inputs that the model accepts; a family without position ids counts positions from the mask.

    Args:
        model: The language model, or its body.
        rows: The rows to run.
        prefix: Cached tokens that precede the rows, if any.
        masked: Whether to mask padding; not needed where it is on the right, where no real token attends to it.
        keep: Whether the output should have a cache.
    """
    inputs: dict[str, Any] = {"input_ids": rows.input_ids, "use_cache": keep}
    if masked:
        inputs |= {"attention_mask": rows.attention_mask, "position_ids": rows.position_ids}
    if prefix is not None:
        mask = torch.cat([prefix.mask_RP, rows.attention_mask], dim=1)
        inputs |= {"attention_mask": mask, "use_cache": True, "past_key_values": prefix.fresh()}
    accepted = _accepted(model)
    return {name: value for name, value in inputs.items() if name in accepted}


def _accepted(model: nn.Module) -> set[str]:
    """Names of the inputs of a model; of a ``forward`` that hands all on, those of the class it comes from."""
    forwards = [model.forward, *(vars(kind).get("forward") for kind in type(model).__mro__)]
    for forward in filter(None, forwards):
        parameters = inspect.signature(forward).parameters.values()
        names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {"self"}
        if names:
            return names
    return set()

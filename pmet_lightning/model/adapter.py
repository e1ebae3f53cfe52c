"""ΔW as a LoRA adapter, which ``peft`` and servers load beside the base model, switch off, merge and swap.

An adapter adds B · A to a weight, of shapes [out, r] and [r, in]: the two factors of ΔW, without any approximation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pmet_lightning.model.patch import PatchError
from pmet_lightning.solver.weight_delta import WeightDelta
from pmet_lightning.utils.errors import PmetError
from pmet_lightning.utils.tensor_files import save_tensors

log = logging.getLogger(__name__)

SERVED_RANK = 512  # the largest that vLLM loads (--max-lora-rank)


def save_adapter(folder: str | Path, deltas: Mapping[str, WeightDelta], manifest: Mapping[str, Any]) -> int:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``.

    Args:
        folder: An existing folder.
        deltas: ΔW by weight name.
        manifest: The manifest of the patch.

    Returns:
        The rank: that of the weight with the most.

    Raises:
        PmetError: If ``peft`` is not installed.
        PatchError: If the patch is of an earlier version, which does not say how the weights are laid out.
        OSError: If the files cannot be written.
    """
    try:
        from peft import LoraConfig, TaskType
    except ImportError as error:
        raise PmetError(f"writing an adapter needs peft ({error}): pip install 'pmet-lightning[peft]'") from error
    if "transposed" not in manifest:
        raise PatchError(
            "the patch is of an earlier version and does not say how the model's weights are laid out; expected one of "
            "this version: write the edits again, or export without --format peft"
        )
    factors = {name.removesuffix(".weight"): delta.factors() for name, delta in deltas.items()}
    ranks = {module: len(left_RO) for module, (left_RO, _) in factors.items()}
    rank = max(ranks.values())
    other_ranks = {module: own for module, own in ranks.items() if own != rank}
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=manifest["model"],
        inference_mode=True,
        r=rank,
        lora_alpha=rank,  # a scale of 1
        rank_pattern=other_ranks,
        alpha_pattern=dict(other_ranks),
        target_modules=list(ranks),
        # A quantised base is always laid out as nn.Linear is.
        fan_in_fan_out=manifest["transposed"] and not manifest.get("quantization"),
    )
    tensors: dict[str, Tensor] = {}
    for module, (left_RO, right_RI) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = right_RI.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = left_RO.T.contiguous()
    save_tensors(Path(folder) / "adapter_model.safetensors", tensors, {"format": "pt"})
    settings.save_pretrained(str(folder))
    if rank > SERVED_RANK:
        log.warning(
            "the adapter has rank %d; vLLM loads adapters up to rank %d: serve the folder that export writes without "
            "--format peft, or edit in smaller steps", rank, SERVED_RANK
        )  # fmt: skip
    return rank

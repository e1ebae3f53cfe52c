"""Where a model family keeps the parts that editing needs: data, found by ``config.model_type``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pmet_lightning.sharding import own_rows, rows_for, summed

SiteName = Literal["attn", "ffn", "hidden"]


@dataclass(frozen=True)
class Architecture:
    """Module paths of one model family.

    Attributes:
        layers: Path of the list of layers in the model, such as ``transformer.h``.
        attn: Path, inside a layer, of the attention output projection.
        ffn: Path, inside a layer, of the FFN output projection (its input is the key, its output m).
        attn_norm: Path, inside a layer, of the root-mean-square norm between the attention output projection and the
            residual stream, in families that have one (Gemma 2, OLMo-2).
        ffn_norm: The same behind the FFN output projection.
    """

    layers: str
    attn: str
    ffn: str
    attn_norm: str | None = None
    ffn_norm: str | None = None


_LLAMA = Architecture("model.layers", "self_attn.o_proj", "mlp.down_proj")
_PHI = Architecture("model.layers", "self_attn.dense", "mlp.fc2")
_BLOOM = Architecture("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h")
_OUTER_NORMS = replace(_LLAMA, attn_norm="post_attention_layernorm", ffn_norm="post_feedforward_layernorm")

ARCHITECTURES: dict[str, Architecture] = {
    "bloom": _BLOOM,
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "falcon": _BLOOM,
    "gemma": _LLAMA,
    "gemma2": _OUTER_NORMS,
    "gemma3": replace(_OUTER_NORMS, layers="model.language_model.layers"),
    "gemma3_text": _OUTER_NORMS,
    "gpt2": Architecture("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neo": Architecture("transformer.h", "attn.attention.out_proj", "mlp.c_proj"),
    "gpt_neox": Architecture("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "gptj": Architecture("transformer.h", "attn.out_proj", "mlp.fc_out"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _OUTER_NORMS,
    "olmo3": _OUTER_NORMS,
    "opt": Architecture("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "phi": _PHI,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
}

# What configurations of mixtures of experts call the number of their experts.
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class UnknownArchitectureError(ValueError):
    """The model's family is not known, was not described, or cannot be edited."""


def architecture_of(config: Any, override: Architecture | None = None) -> Architecture:
    """Find the family of a model by its ``config.model_type``.

    Args:
        config: A Hugging Face model configuration.
        override: A description that is used instead of the table.

    Raises:
        UnknownArchitectureError: If the model is a mixture of experts, or the type is not in the table and there is
            no override.
    """
    text = config.get_text_config()
    experts = next((int(getattr(text, name)) for name in _EXPERT_COUNTS if getattr(text, name, None)), 1)
    if experts > 1:
        raise UnknownArchitectureError(
            f"{config.model_type!r} is a mixture of {experts} experts: its router sends a subject's token to a few of "
            "them, by weights that every edit would shift, so that no single FFN output projection holds a fact. "
            "Expected a model with one FFN a layer."
        )
    if override is not None:
        return override
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UnknownArchitectureError(
            f"the model type {config.model_type!r} is unknown; known are {', '.join(sorted(ARCHITECTURES))}. "
            "Describe it with --model.architecture.layers, .attn and .ffn (paths of the list of layers and, "
            "inside a layer, of the two output projections), for example "
            "{layers: model.layers, attn: self_attn.o_proj, ffn: mlp.down_proj}; where the layer norms a projection's "
            "output before adding it, with .attn_norm and .ffn_norm too."
        )
    return found


def depth_of(config: Any) -> int:
    """Number of layers."""
    return int(config.get_text_config().num_hidden_layers)


def advised_layers(depth: int) -> list[int]:
    """Layers to edit in a model without published settings: up to five, the last a quarter of the way up.

    The published ranges end between 0.23 (GPT-NeoX, 10 of 44) and 0.35 (GPT-2 XL, 17 of 48) of the depth, at 0.29 in
    GPT-J (8 of 28) and at 0.25 in the 32-layer models of the editing toolboxes (8 of 32).

    Args:
        depth: Number of layers of the model.
    """
    last = max(1, round(depth / 4)) if depth > 1 else 0
    return list(range(max(0, last - 4), last + 1))


@dataclass(frozen=True)
class Sites:
    """The modules of one model at which vectors are recorded, added and written."""

    layers: nn.ModuleList
    architecture: Architecture

    @classmethod
    def of(cls, model: nn.Module, architecture: Architecture) -> Sites:
        """Bind an architecture to a model.

        Raises:
            UnknownArchitectureError: If the described paths do not exist in the model.
        """
        try:
            layers = model.get_submodule(architecture.layers)
            for path in (architecture.attn, architecture.ffn, architecture.attn_norm, architecture.ffn_norm):
                if path is not None:
                    layers[0].get_submodule(path)  # type: ignore[operator,union-attr,index]
        except AttributeError as error:
            raise UnknownArchitectureError(
                f"the architecture {architecture} does not fit {type(model).__name__}: {error}"
            ) from error
        sites = cls(layers, architecture)  # type: ignore[arg-type]
        for site in ("attn", "ffn"):
            if isinstance(sites.norm(site, 0), nn.LayerNorm):
                raise UnknownArchitectureError(
                    f"the norm behind the {site} output projection is a LayerNorm; expected a root-mean-square norm, "
                    "the only kind whose output can be traced back to the projection's"
                )
        return sites

    def _path(self, site: SiteName) -> str:
        return self.architecture.attn if site == "attn" else self.architecture.ffn

    def module(self, site: SiteName, layer: int) -> nn.Module:
        """The module whose output is a^l (``attn``), m^l (``ffn``) or h^l (``hidden``)."""
        if site == "hidden":
            return self.layers[layer]
        return self.layers[layer].get_submodule(self._path(site))

    def ffn_block(self, layer: int) -> nn.Module | None:
        """The module of a layer that is its whole FFN, in families that have one which takes hidden states alone."""
        path, _, _ = self.architecture.ffn.rpartition(".")
        if not path or self.architecture.attn.startswith(f"{path}."):
            return None
        block = self.layers[layer].get_submodule(path)
        return block if len(inspect.signature(block.forward).parameters) == 1 else None

    def token_modules(self, layer: int) -> list[nn.Module]:
        """Modules of a layer that map each token by itself: the FFN, and projections outside of it."""
        block = self.ffn_block(layer)
        inside = set() if block is None else set(block.modules())
        projections = [m for m in self.layers[layer].modules() if is_projection(m) and m not in inside]
        return projections if block is None else [block, *projections]

    def norm(self, site: SiteName, layer: int) -> nn.Module | None:
        """The norm between a projection and the residual stream, in families that have one."""
        paths = {"attn": self.architecture.attn_norm, "ffn": self.architecture.ffn_norm, "hidden": None}
        path = paths[site]
        return None if path is None else self.layers[layer].get_submodule(path)

    def weight_name(self, site: SiteName, layer: int) -> str:
        """Name of a site's weight in the model's ``state_dict``."""
        return f"{self.architecture.layers}.{layer}.{self._path(site)}.weight"

    @property
    def width(self) -> int:
        """Width of the residual stream (the embedding's may differ, as in OPT-350m)."""
        return out_features(self.module("ffn", 0))


def is_projection(module: nn.Module) -> bool:
    """Whether it is ``nn.Linear`` or the ``Conv1D`` of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_transposed(projection: nn.Module) -> bool:
    """Whether the weight is stored [in, out] (``Conv1D`` of GPT-2) and not [out, in] (``nn.Linear``).

    Decided by type: a square weight says nothing by its shape.
    """
    if is_projection(projection):
        return not isinstance(projection, nn.Linear)
    raise UnknownArchitectureError(
        f"the output projection is a {type(projection).__name__}; expected nn.Linear or Conv1D. Point "
        "--model.architecture at the projection itself."
    )


def in_features(projection: nn.Module) -> int:
    """Width of the keys of a projection."""
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0 if is_transposed(projection) else 1])


def out_features(projection: nn.Module) -> int:
    """Width of the values of a projection."""
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1 if is_transposed(projection) else 0])


@dataclass(frozen=True)
class Written:
    """What became of a ΔW when the sum was stored in the weight's own dtype.

    Attributes:
        kept: ⟨stored change, ΔW⟩ / ‖ΔW‖², 1 if nothing was lost.
        changed: Share of the weight's entries with ΔW ≠ 0 that are now different.
        rounding: ‖stored change − ΔW‖ / ‖ΔW‖.
    """

    kept: float
    changed: float
    rounding: float


def add_to_weight(projection: nn.Module, delta_OI: Tensor) -> Written:
    """W ← W + ΔW, the sum formed in ΔW's precision and then stored in the weight's own dtype.

    Args:
        projection: ``nn.Linear`` or ``Conv1D``; of a sharded one, each process writes the rows that it holds.
        delta_OI: Shape [out, in], whole on every process.

    Returns:
        How much of ΔW the stored weight has.
    """
    weight = projection.weight
    assert isinstance(weight, Tensor)
    own = own_rows(weight)
    delta = rows_for(weight, delta_OI.T if is_transposed(projection) else delta_OI)
    before = own.to(delta.dtype, copy=True)
    own.copy_(before + delta)
    stored = own.to(delta.dtype) - before
    moving = delta != 0
    sums = (stored * delta, delta.square(), (stored - delta).square(), moving, stored[moving] != 0)
    product, square, lost, wanted, moved = summed(weight, torch.stack([part.sum().double() for part in sums])).tolist()
    square = max(square, torch.finfo(torch.float64).tiny)
    return Written(product / square, moved / wanted if wanted else 1.0, (lost / square) ** 0.5)


def keep_in_float32(projection: nn.Module) -> None:
    """Hold a half-precision projection's weight in float32, so that edits of it are not rounded away.

    Its inputs are converted on the way in and its outputs on the way out; the rest of the model stays as it is. A
    projection of higher precision stays as it is, too.
    """
    if projection.weight.dtype in (torch.bfloat16, torch.float16):
        projection.float()
        projection.forward = partial(_forward_in_float32, projection)


def _forward_in_float32(projection: nn.Module, inputs: Tensor) -> Tensor:
    output: Tensor = type(projection).forward(projection, inputs.float())
    return output.to(inputs.dtype)

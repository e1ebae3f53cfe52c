"""Where each model family keeps the modules that editing needs: a table by ``config.model_type``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from pmet_lightning.model.quantization import refuse_quantized_config
from pmet_lightning.utils.errors import PmetError

SiteName = Literal["attn", "ffn", "hidden"]


@dataclass(frozen=True)
class Architecture:
    """Module paths of one model family.

    Attributes:
        layers: Path of the list of layers in the model, such as ``transformer.h``. Inside a model of several kinds of
            input it is found in its text model (:func:`~pmet_lightning.model.projections.find_layers`).
        attn: Path, inside a layer, of the attention output projection.
        ffn: Path, inside a layer, of the FFN output projection (its input is the key, its output m).
        attn_norm: Path, inside a layer, of the root-mean-square norm between the attention output projection and the
            residual stream, in families that have one (Gemma 2, OLMo-2).
        ffn_norm: The same after the FFN output projection.
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
    "falcon_h1": replace(_LLAMA, ffn="feed_forward.down_proj"),
    "gemma": _LLAMA,
    "gemma2": _OUTER_NORMS,
    "gemma3_text": _OUTER_NORMS,
    "gemma4_text": _OUTER_NORMS,
    "gpt2": Architecture("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neo": Architecture("transformer.h", "attn.attention.out_proj", "mlp.c_proj"),
    "gpt_neox": Architecture("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "gptj": Architecture("transformer.h", "attn.out_proj", "mlp.fc_out"),
    "lfm2": Architecture("model.layers", "self_attn.out_proj", "feed_forward.w2"),
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
    "qwen3_5_text": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
}

# Names of the number of experts in configurations of mixtures of experts.
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class UnknownArchitectureError(PmetError):
    """The model's family is neither in the table nor described, or it cannot be edited."""


def architecture_of(config: Any, override: Architecture | None = None) -> Architecture:
    """Find the family of a model, or of the text model inside it, by its ``config.model_type``.

    Args:
        config: A Hugging Face model configuration.
        override: A description to use instead of the table.

    Raises:
        UnknownArchitectureError: If the model is a mixture of experts, or the type is not in the table and there is
            no override.
        QuantizationError: If its weights are quantised.
    """
    refuse_quantized_config(config)
    text = config.get_text_config()
    experts = next((int(getattr(text, name)) for name in _EXPERT_COUNTS if getattr(text, name, None)), 1)
    if experts > 1:
        raise UnknownArchitectureError(
            f"{config.model_type!r} is a mixture of {experts} experts: its router sends a subject's token to a few of "
            "them, by weights that every edit would shift, so that no single FFN output projection holds a fact. "
            "Expected a model with one FFN per layer."
        )
    if override is not None:
        return override
    found = ARCHITECTURES.get(config.model_type) or ARCHITECTURES.get(getattr(text, "model_type", ""))
    if found is None:
        raise UnknownArchitectureError(
            f"the model type {config.model_type!r} is unknown; the known ones are {', '.join(sorted(ARCHITECTURES))}. "
            "Describe it with --model.architecture.layers, .attn and .ffn (paths of the list of layers and, "
            "inside a layer, of the two output projections), for example "
            "{layers: model.layers, attn: self_attn.o_proj, ffn: mlp.down_proj}; where the layer normalizes a "
            "projection's output before adding it, with .attn_norm and .ffn_norm too."
        )
    return found


def depth_of(config: Any) -> int:
    """Number of layers."""
    return int(config.get_text_config().num_hidden_layers)


def embedding_rows(model_or_config: Any) -> int | None:
    """Number of rows of the embedding of a model or, from its configuration, of one that is not loaded; if known."""
    if hasattr(model_or_config, "get_input_embeddings"):
        return int(model_or_config.get_input_embeddings().weight.shape[0])
    return getattr(model_or_config.get_text_config(), "vocab_size", None)


def suggest_layers(depth: int) -> list[int]:
    """Layers to edit in a model without published settings: up to five, the last of them a quarter of the way up.

    The published ranges end between 0.23 (GPT-NeoX, 10 of 44) and 0.35 (GPT-2 XL, 17 of 48) of the depth, at 0.29 in
    GPT-J (8 of 28) and at 0.25 in the 32-layer models of the editing toolboxes (8 of 32).

    Args:
        depth: Number of layers of the model.
    """
    last = max(1, round(depth / 4)) if depth > 1 else 0
    return list(range(max(0, last - 4), last + 1))


ProjectionId = tuple[SiteName, int]


def name_of(projection_id: ProjectionId) -> str:
    """What files call a site and layer, as in ``ffn-7``."""
    return "{}-{}".format(*projection_id)


def projection_of(name: str) -> ProjectionId:
    """The reverse of :func:`name_of`.

    Raises:
        ValueError: If the name is not that of a site and a layer.
    """
    site, layer = name.split("-")
    return site, int(layer)  # type: ignore[return-value]


WriteChoice = Literal["ffn", "attn+ffn"]


def written_sites(write: WriteChoice) -> tuple[SiteName, ...]:
    """Sites whose weights are written, in the order of writing within a layer."""
    return ("ffn",) if write == "ffn" else ("attn", "ffn")

"""Where a model family keeps the parts that editing needs: data, found by ``config.model_type``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

SiteName = Literal["attn", "ffn", "hidden"]


@dataclass(frozen=True)
class Architecture:
    """Module paths of one model family.

    Attributes:
        layers: Path of the list of layers in the model, such as ``transformer.h``.
        attn: Path, inside a layer, of the attention output projection.
        ffn: Path, inside a layer, of the FFN output projection (its input is the key, its output m).
    """

    layers: str
    attn: str
    ffn: str


_LLAMA = Architecture("model.layers", "self_attn.o_proj", "mlp.down_proj")

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gptj": Architecture("transformer.h", "attn.out_proj", "mlp.fc_out"),
    "gpt_neox": Architecture("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


class UnknownArchitectureError(ValueError):
    """The model's family is not known and was not described."""


def architecture_of(config: Any, override: Architecture | None = None) -> Architecture:
    """Find the family of a model by its ``config.model_type``.

    Args:
        config: A Hugging Face model configuration.
        override: A description that is used instead of the table.

    Raises:
        UnknownArchitectureError: If the type is not in the table and there is no override.
    """
    if override is not None:
        return override
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UnknownArchitectureError(
            f"the model type {config.model_type!r} is unknown; known are {', '.join(sorted(ARCHITECTURES))}. "
            "Describe it with --model.architecture.layers, .attn and .ffn (paths of the list of layers and, "
            "inside a layer, of the two output projections), for example "
            "{layers: model.layers, attn: self_attn.o_proj, ffn: mlp.down_proj}."
        )
    return found


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
            for path in (architecture.attn, architecture.ffn):
                layers[0].get_submodule(path)  # type: ignore[operator,union-attr,index]
        except AttributeError as error:
            raise UnknownArchitectureError(
                f"the architecture {architecture} does not fit {type(model).__name__}: {error}"
            ) from error
        return cls(layers, architecture)  # type: ignore[arg-type]

    def module(self, site: SiteName, layer: int) -> nn.Module:
        """The module whose output is a^l (``attn``), m^l (``ffn``) or h^l (``hidden``)."""
        if site == "hidden":
            return self.layers[layer]
        path = self.architecture.attn if site == "attn" else self.architecture.ffn
        return self.layers[layer].get_submodule(path)

    def weight_name(self, site: SiteName, layer: int) -> str:
        """Name of a site's weight in the model's ``state_dict``."""
        path = self.architecture.attn if site == "attn" else self.architecture.ffn
        return f"{self.architecture.layers}.{layer}.{path}.weight"


def is_transposed(projection: nn.Module) -> bool:
    """Whether the weight is stored [in, out] (``Conv1D`` of GPT-2) and not [out, in] (``nn.Linear``).

    Decided by type: a square weight says nothing by its shape.
    """
    if isinstance(projection, nn.Linear):
        return False
    if type(projection).__name__ == "Conv1D":
        return True
    raise UnknownArchitectureError(
        f"the output projection is a {type(projection).__name__}; expected nn.Linear or Conv1D. Point "
        "--model.architecture at the projection itself."
    )


def in_features(projection: nn.Module) -> int:
    """Width of the keys of a projection."""
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0 if is_transposed(projection) else 1])


def add_to_weight(projection: nn.Module, delta_OI: Tensor) -> None:
    """W ← W + ΔW, the sum formed in ΔW's precision and then stored in the weight's own dtype.

    Args:
        projection: ``nn.Linear`` or ``Conv1D``.
        delta_OI: Shape [out, in].
    """
    weight = projection.weight
    assert isinstance(weight, Tensor)
    delta = delta_OI.T if is_transposed(projection) else delta_OI
    total = weight.detach().to(delta.dtype) + delta.to(weight.device)
    weight.data.copy_(total)

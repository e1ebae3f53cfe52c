"""The output projections of one model: where they are, how their weights are laid out, and adding ΔW to them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.model.architectures import Architecture, ProjectionId, SiteName, UnknownArchitectureError
from pmet_lightning.model.fsdp import local_part, local_rows, sum_over_shards


def find_layers(model: nn.Module, architecture: Architecture) -> Architecture:
    """The architecture with the path of the layers in this model, whose text model may be a part of it.

    Args:
        model: The model.
        architecture: That of its text model by itself, or its own.
    """
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = None if get_decoder is None else get_decoder()
    name = architecture.layers.rpartition(".")[2]
    if _has(model, architecture.layers) or not isinstance(getattr(decoder, name, None), nn.ModuleList):
        return architecture
    path = next(path for path, module in model.named_modules() if module is decoder)
    return replace(architecture, layers=f"{path}.{name}")


@dataclass(frozen=True)
class Sites:
    """The modules of one model at which vectors are recorded, added and written."""

    layers: nn.ModuleList
    architecture: Architecture

    @classmethod
    def of(cls, model: nn.Module, architecture: Architecture) -> Sites:
        """Bind an architecture to a model. Not every layer needs to have every module: a hybrid has several kinds.

        Raises:
            UnknownArchitectureError: If the described paths do not exist in the model.
        """
        architecture = find_layers(model, architecture)
        try:
            layers: Any = model.get_submodule(architecture.layers)
            for path in (architecture.attn, architecture.ffn, architecture.attn_norm, architecture.ffn_norm):
                if path is not None and not any(_has(layer, path) for layer in layers):
                    layers[0].get_submodule(path)
        except AttributeError as error:
            raise UnknownArchitectureError(
                f"the architecture {architecture} does not fit {type(model).__name__}: {error}"
            ) from error
        sites = cls(layers, architecture)
        for site in ("attn", "ffn"):
            if isinstance(sites.norm(site, sites.layers_with(site)[0]), nn.LayerNorm):
                raise UnknownArchitectureError(
                    f"the norm after the {site} output projection is a LayerNorm; expected a root-mean-square norm, "
                    "the only kind whose output can be mapped back to the projection's"
                )
        return sites

    def _path(self, site: SiteName) -> str:
        return self.architecture.attn if site == "attn" else self.architecture.ffn

    def module(self, site: SiteName, layer: int) -> nn.Module:
        """The module whose output is a^l (``attn``), m^l (``ffn``) or h^l (``hidden``).

        Raises:
            UnknownArchitectureError: If the layer has none.
        """
        if site == "hidden":
            return self.layers[layer]
        if not self.has(site, layer):
            kind = "attention" if site == "attn" else "FFN"
            raise UnknownArchitectureError(
                f"layer {layer} has no {kind} output projection {self._path(site)!r}: the model has several kinds of "
                f"layers (a hybrid). Expected one of the layers {self.layers_with(site)}, which have it; choose among "
                "them with --model.layers, or describe the projection with --model.architecture"
            )
        return self.layers[layer].get_submodule(self._path(site))

    def has(self, site: SiteName, layer: int) -> bool:
        """Whether a layer has the module: in a hybrid, some have no attention, or no FFN."""
        return site == "hidden" or _has(self.layers[layer], self._path(site))

    def layers_with(self, site: SiteName) -> list[int]:
        """The layers that have a site."""
        return [layer for layer in range(len(self.layers)) if self.has(site, layer)]

    def written(self, sites: Sequence[SiteName], layers: Sequence[int]) -> list[ProjectionId]:
        """The projections of some sites in some layers, in the order of writing; attention is left out where it lacks.

        Raises:
            UnknownArchitectureError: If a layer has no FFN.
        """
        found: list[ProjectionId] = [(s, layer) for layer in layers for s in sites if s == "ffn" or self.has(s, layer)]
        for projection_id in found:
            self.module(*projection_id)
        return found

    def ffn_block(self, layer: int) -> nn.Module | None:
        """The module of a layer that is its whole FFN, in families that have one with hidden states as only input."""
        path, _, _ = self.architecture.ffn.rpartition(".")
        if not path or not _has(self.layers[layer], path) or self.architecture.attn.startswith(f"{path}."):
            return None
        block = self.layers[layer].get_submodule(path)
        return block if len(inspect.signature(block.forward).parameters) == 1 else None

    def token_modules(self, layer: int) -> list[nn.Module]:
        """Modules of a layer that map each token independently: the FFN, and projections outside of it."""
        block = self.ffn_block(layer)
        inside = set() if block is None else set(block.modules())
        projections = [m for m in self.layers[layer].modules() if is_projection(m) and m not in inside]
        return projections if block is None else [block, *projections]

    def norm(self, site: SiteName, layer: int) -> nn.Module | None:
        """The norm between a projection and the residual stream, in families that have one."""
        paths = {"attn": self.architecture.attn_norm, "ffn": self.architecture.ffn_norm, "hidden": None}
        path = paths[site]
        return None if path is None or not _has(self.layers[layer], path) else self.layers[layer].get_submodule(path)

    def weight_name(self, site: SiteName, layer: int) -> str:
        """Name of a site's weight in the model's ``state_dict``."""
        return f"{self.architecture.layers}.{layer}.{self._path(site)}.weight"

    @property
    def width(self) -> int:
        """Width of the residual stream (the embedding's may differ, as in OPT-350m)."""
        return out_features(self.module("ffn", self.layers_with("ffn")[0]))


def _has(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def is_projection(module: nn.Module) -> bool:
    """Whether a module is ``nn.Linear`` or the ``Conv1D`` of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_transposed(projection: nn.Module) -> bool:
    """Whether the weight is stored [in, out] (``Conv1D`` of GPT-2) and not [out, in] (``nn.Linear``).

    Decided by type: the shape of a square weight does not tell.
    """
    if is_projection(projection):
        return not isinstance(projection, nn.Linear)
    raise UnknownArchitectureError(
        f"the output projection is a {type(projection).__name__}; expected nn.Linear or Conv1D. Point "
        "--model.architecture at the projection itself."
    )


def in_features(projection: nn.Module) -> int:
    """Width of the keys of a projection."""
    return _shape_OI(projection)[1]


def out_features(projection: nn.Module) -> int:
    """Width of the values of a projection."""
    return _shape_OI(projection)[0]


def _shape_OI(projection: Any) -> tuple[int, int]:
    """Out- and in-features; the shape of a quantised weight is that of its packed bits."""
    if is_transposed(projection):
        return int(projection.weight.shape[1]), int(projection.weight.shape[0])
    return int(projection.out_features), int(projection.in_features)


@dataclass(frozen=True)
class StoredDelta:
    """How much of a ΔW remained when the sum was stored in the weight's own dtype.

    Attributes:
        kept: ⟨stored change, ΔW⟩ / ‖ΔW‖², 1 if nothing was lost.
        changed: Share of the weight's entries with ΔW ≠ 0 that are now different.
        rounding: ‖stored change − ΔW‖ / ‖ΔW‖.
    """

    kept: float
    changed: float
    rounding: float


def add_to_weight(projection: nn.Module, delta_OI: Tensor) -> StoredDelta:
    """W ← W + ΔW, the sum formed in ΔW's precision and then stored in the weight's own dtype.

    Args:
        projection: ``nn.Linear`` or ``Conv1D``; of a sharded one, each process writes the rows that it holds.
        delta_OI: Shape [out, in], whole on every process.

    Returns:
        How much of ΔW the stored weight retains.
    """
    weight = projection.weight
    assert isinstance(weight, Tensor)
    rows = local_rows(weight)
    delta = local_part(weight, delta_OI.T if is_transposed(projection) else delta_OI)
    before = rows.to(delta.dtype, copy=True)
    rows.copy_(before + delta)
    stored = rows.to(delta.dtype) - before
    moving = delta != 0
    sums = (stored * delta, delta.square(), (stored - delta).square(), moving, stored[moving] != 0)
    product, square, lost, nonzero, moved = sum_over_shards(
        weight, torch.stack([part.sum().double() for part in sums])
    ).tolist()
    square = max(square, torch.finfo(torch.float64).tiny)
    return StoredDelta(product / square, moved / nonzero if nonzero else 1.0, (lost / square) ** 0.5)


def keep_in_float32(projection: nn.Module) -> None:
    """Hold a half-precision projection's weight in float32, so that edits to it are not rounded away.

    Its inputs are converted on the way in and its outputs on the way out; the rest of the model is unchanged, and so is
    a projection of higher precision.
    """
    assert isinstance(projection.weight, Tensor)
    loaded = projection.weight.dtype
    if loaded in (torch.bfloat16, torch.float16):
        projection.float()
        projection.forward = partial(_forward_in_float32, projection, loaded)


def held_precisions(model: nn.Module) -> dict[str, torch.dtype]:
    """The precision of each projection that is held in float32 before it was, by its path in the model."""
    found = {}
    for path, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _forward_in_float32:
            found[path] = forward.args[1]
    return found


def _forward_in_float32(projection: nn.Module, loaded: torch.dtype, inputs: Tensor) -> Tensor:
    output: Tensor = type(projection).forward(projection, inputs.float())
    return output.to(inputs.dtype)

"""What is searched over: how targets are found, and how they are written.

One target run serves many writes: targets depend on neither λ, nor the spread rule, nor the first edited layer. With
``successive`` those of the first layer do not; those above are found anew for each write.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pmet_lightning.targets.construction import Construction
from pmet_lightning.targets.target_optimizer import OptimizedSites
from pmet_lightning.write.residual import SpreadRule

Penalties = Literal["none", "published"]
Direction = Literal["lam", "width", "rule"]

STEPS = 25  # iterations for one edit: not searched
PRESERVE_PROMPTS = 0.3  # μ: not searched, as it hardly matters between 0.1 and 1
WIDTHS = (1, 3, 5)  # numbers of edited layers
DEEPEST = 2 / 3  # of the depth: targets live below
OPTIMIZED: tuple[OptimizedSites, ...] = ("ffn", "attn+ffn", "hidden")
CONSTRUCTIONS: tuple[Construction, ...] = ("spread", "replay", "successive")
_UPWARDS: tuple[Construction, ...] = ("replay", "successive")  # their first target is in the first edited layer
CLAMPS = (0.4, 20.0)  # in norms of the clean output
STRIDES = (0.02, 20.0)  # share of the radius of its ball that a delta can move in one step of Adam; above 1, across it
PENALTIES: dict[Penalties, dict[str, float]] = {
    "none": {"kl_factor": 0.0, "norm_factor": 0.0},
    "published": {"kl_factor": 0.0625, "norm_factor": 0.5},
}
LAM_STEP = 3.0  # ratio of neighboring values of λ
LAM_UNIT = 0.1  # λ / d_k in the middle of its values; published: 0.03 to 1
LAM_STEPS = range(-4, 5)
DIRECTIONS: tuple[Direction, ...] = ("lam", "width", "rule")


@dataclass(frozen=True)
class TargetSetting:
    """How targets are found.

    Attributes:
        layer: The layer that gets a delta: with ``spread`` the last edited one, L, with ``replay`` and ``successive``
            the first.
        optimize: What gets a delta.
        clamp: Radius of its ball, in norms of the clean output.
        stride: Share of the radius that one step of Adam can move it.
        penalties: Whether the terms of the loss beside the likelihood are used, with their published weights.
        targets: Where the targets of the edited layers come from.
    """

    layer: int
    optimize: OptimizedSites = "ffn"
    clamp: float = 2.0
    stride: float = 0.1
    penalties: Penalties = "none"
    targets: Construction = "spread"


@dataclass(frozen=True)
class WriteSetting:
    """How targets are written.

    Attributes:
        width: Number of edited layers.
        rule: Share of the residual that a layer takes; not used where each layer has targets of its own.
        lam_step: λ, in steps from the middle of its values.
    """

    width: int = 3
    rule: SpreadRule = "sqrt"
    lam_step: int = 0


@dataclass(frozen=True)
class Setting:
    """All that is chosen.

    Attributes:
        target: How targets are found.
        write: How they are written.
    """

    target: TargetSetting
    write: WriteSetting

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"target": asdict(self.target), "write": asdict(self.write)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Setting:
        """From what :meth:`plain` has made."""
        return cls(TargetSetting(**plain["target"]), WriteSetting(**plain["write"]))

    @property
    def layers(self) -> list[int]:
        """The edited layers."""
        return layers_of(self.target, self.write.width)


@dataclass(frozen=True)
class Scale:
    """The units of a model, which make one search space fit all.

    Attributes:
        ffn_sizes: Size of an entry of the clean FFN output at the subject's last token, by layer.
        hidden_sizes: The same of the layer's output.
        key_width: Width of the keys d_k.
    """

    ffn_sizes: Mapping[int, float]
    hidden_sizes: Mapping[int, float]
    key_width: int

    def learning_rate(self, target: TargetSetting) -> float:
        """Adam's: each step moves every entry of a delta by about as much."""
        sizes = self.hidden_sizes if target.optimize == "hidden" else self.ffn_sizes
        return rounded(target.stride * target.clamp * sizes[target.layer])

    def lam(self, write: WriteSetting) -> float:
        """λ, in preserved keys."""
        return rounded(LAM_UNIT * self.key_width * LAM_STEP**write.lam_step)

    def sections(self, setting: Setting) -> dict[str, dict[str, Any]]:
        """The settings as a configuration has them."""
        adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": self.learning_rate(setting.target)}}
        return {
            "model": {
                "layers": setting.layers,
                "optimize": setting.target.optimize,
                "optimizer": adam,
                "clamp": setting.target.clamp,
                **PENALTIES[setting.target.penalties],
                # What one write misses the next target makes up for, as far as the loss shows it.
                **({"stop_at_argmax": False} if setting.target.targets == "successive" else {}),
            },
            "spread": {
                "lam": self.lam(setting.write),
                "rule": setting.write.rule,
                "targets": setting.target.targets,
            },
        }


def rounded(value: float, digits: int = 2) -> float:
    """A number with so many significant digits: what is chosen is no more exact than that."""
    return float(f"{value:.{digits}g}")


def target_layers(depth: int, with_ffn: Sequence[int], first: Sequence[int] = ()) -> list[int]:
    """The layers in which targets may live, from coarse to fine: a search that stops early has seen all depths.

    The first is a quarter of the way up, where published ranges end.

    Args:
        depth: Number of layers of the model.
        with_ffn: Those that have an FFN; a hybrid may have others.
        first: Those that come before all others, if targets may live in them.
    """
    last = max(0, min(math.floor(DEEPEST * depth), depth - 2))
    layers = [layer for layer in with_ffn if layer <= last] or list(with_ffn[:1])
    ordered = [min(layers, key=lambda layer: abs(layer - depth / 4))]
    step = 1 << max(0, (len(layers) - 1).bit_length())
    while step:
        ordered += [layer for layer in layers[::-1][::step][::-1] if layer not in ordered]
        step //= 2
    return [layer for layer in first if layer in layers] + [layer for layer in ordered if layer not in first]


def edited_layers(depth: int, with_ffn: Sequence[int]) -> list[int]:
    """All layers that may be edited: up to the uppermost in which targets may live; as for :func:`target_layers`."""
    deepest = max(target_layers(depth, with_ffn))
    return [layer for layer in with_ffn if layer <= deepest]


def layers_of(target: TargetSetting, width: int) -> list[int]:
    """So many edited layers: with ``replay`` and ``successive`` from the layer of the delta upwards, else up to it."""
    first = target.layer if target.targets in _UPWARDS else target.layer - width + 1
    return list(range(first, first + width))


def widths_at(target: TargetSetting, editable: Sequence[int]) -> list[int]:
    """The numbers of edited layers that are possible: all of them may be edited; near an end, all as far as that."""
    present = set(editable)
    possible = [width for width in range(1, WIDTHS[-1] + 1) if set(layers_of(target, width)) <= present]
    return [width for width in possible if width in WIDTHS or width == possible[-1]]


def directions_of(target: TargetSetting) -> tuple[Direction, ...]:
    """What of a write may change: where each layer has targets of its own, nothing is shared by a rule."""
    return DIRECTIONS if target.targets == "spread" else DIRECTIONS[:-1]


def write_neighbors(write: WriteSetting, widths: Sequence[int], moved: Direction) -> list[WriteSetting]:
    """The settings beside one in one direction."""
    if moved == "rule":
        others: list[SpreadRule] = ["even" if write.rule == "sqrt" else "sqrt"]
        return [WriteSetting(write.width, rule, write.lam_step) for rule in others if write.width > 1]
    if moved == "width":
        return [WriteSetting(width, write.rule, write.lam_step) for width in widths if width != write.width]
    steps = (write.lam_step - 1, write.lam_step + 1)
    return [WriteSetting(write.width, write.rule, step) for step in steps if step in LAM_STEPS]

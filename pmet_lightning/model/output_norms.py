"""Families that normalize a projection's output before adding it to the residual stream (Gemma 2 and 3, OLMo-2).

Such a layer contributes norm(p), where p is the projection's output. The norm fixes its length: only its direction can
be edited. Target vectors live in p, and the optimization runs through the model's own norm after it; the change that a
layer should make to the residual stream is pulled back through its own norm before the solve.
Legend: N = edits, O = width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BISECTIONS = 80  # halvings of an interval in float64


def pull_back(norm: nn.Module, current_NO: Tensor, change_NO: Tensor) -> Tensor:
    """Change of p, at unchanged length, after which norm(p) is as close as possible to norm(p) + change.

    A root-mean-square norm gives g ⊙ u with u = p / rms(p), a point of the sphere ‖u‖² = O. The nearest reachable
    point minimizes ‖g ⊙ u − goal‖ on that sphere: u = g · goal / (g² + μ), with μ ≥ 0 such that u lies on it. Where u
    lies inside even for μ = 0, the goal's own direction is taken.

    Args:
        norm: The norm module.
        current_NO: p of each edit, shape [N, O].
        change_NO: Wanted change of the contribution, shape [N, O].

    Returns:
        Shape [N, O], float64. Zero where no change is wanted.
    """
    current, width = current_NO.double(), current_NO.shape[-1]
    gain = norm(torch.ones_like(current_NO[:1])).double()
    goal = norm(current_NO).double() + change_NO.double()
    floor = 1e-12 * gain.square().mean()

    def point(mu_N1: Tensor) -> Tensor:
        return gain * goal / (gain.square() + mu_N1 + floor)

    low = torch.zeros_like(goal[:, :1])
    high = (gain * goal).norm(dim=-1, keepdim=True) / width**0.5  # inside: ‖point(μ)‖ ≤ ‖g · goal‖ / μ
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        outside = point(middle).norm(dim=-1, keepdim=True) > width**0.5
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    direction = point(high)
    length = current.norm(dim=-1, keepdim=True)
    return direction * (length / direction.norm(dim=-1, keepdim=True).clamp_min(1e-300)) - current

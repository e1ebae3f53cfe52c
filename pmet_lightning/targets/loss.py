"""The norm penalty of the deltas and their projection onto a ball (docs/method.md, 'Targets'): pure functions.

Legend: B = edits, F = features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm_penalty(delta_BF: Tensor, clean_BF: Tensor) -> Tensor:
    """‖δ‖ / ‖clean‖² for each edit: only the denominator is squared (docs/method.md, choice 5); shape [B]."""
    return delta_BF.norm(dim=-1) / clean_BF.norm(dim=-1).square()


def project_to_ball(delta_BF: Tensor, radius_B: Tensor) -> Tensor:
    """Scale each δ that is longer than its radius back to that length; shape [B, F]."""
    norm = delta_BF.norm(dim=-1)
    scale = torch.where(norm > radius_B, radius_B / norm, torch.ones_like(norm))
    return delta_BF * scale.unsqueeze(-1)

"""The logits at some tokens, made part by part: a vocabulary of 262,144 makes them larger than all that made them.

Legend: N = tokens, n = those of a part, F = model width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Logits [n, V] and the position of the first of the n tokens among all N -> tensors of n rows. Only the first of them,
# of one number for each token, is differentiated.
Measure = Callable[[Tensor, int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Logits:
    """What gives the logits at some tokens.

    Attributes:
        inputs: Hidden states that leave the model's last layer, shape [N, F]; without ``head`` the logits, [N, V].
        head: What makes of [n, F] the logits [n, V], of each token from its own hidden state.
        most: How many tokens have their logits at the same time.
    """

    inputs: Tensor
    head: Callable[[Tensor], Tensor] | None = None
    most: int = 1

    def measure(self, measure: Measure) -> tuple[Tensor, ...]:
        """What a function says of the logits, shape [N, ...] each.

        A token's value depends on its own hidden state alone, so its gradient is taken as soon as it is known: nothing
        of the vocabulary's size is kept for the backward pass, and nothing is computed twice.

        Args:
            measure: The function.
        """
        if self.head is None:
            return measure(self.inputs, 0)
        wanted = torch.is_grad_enabled() and self.inputs.requires_grad
        found: list[tuple[Tensor, ...]] = []
        slopes: list[Tensor] = []
        first = 0
        for part_nF in self.inputs.detach().split(self.most):
            value_n, *others = measure(self.head(part_nF.requires_grad_(wanted)), first)
            if wanted:
                slopes += torch.autograd.grad(value_n.sum(), part_nF)
            found.append((value_n.detach(), *others))
            first += len(part_nF)
        value_N, *rest = (torch.cat(parts) for parts in zip(*found, strict=True))
        if wanted:
            value_N = _WithSlopes.apply(self.inputs, value_N, torch.cat(slopes))
        return value_N, *rest

    def whole(self) -> Tensor:
        """All logits, shape [N, V]."""
        return self.inputs if self.head is None else self.head(self.inputs)


class _WithSlopes(torch.autograd.Function):
    """Values of tokens whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, hidden_NF: Tensor, value_N: Tensor, slopes_NF: Tensor) -> Tensor:
        ctx.save_for_backward(slopes_NF)
        return value_N.view_as(value_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slopes_NF,), (gradient_N,) = ctx.saved_tensors, gradients
        return (gradient_N.unsqueeze(-1) * slopes_NF).to(slopes_NF), None, None

"""What a layer shall add is pulled back through the norm it adds it by."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pmet_lightning.model.architectures import Architecture, UnknownArchitectureError
from pmet_lightning.model.output_norms import pull_back
from pmet_lightning.model.projections import Sites

WIDTH = 12


@pytest.fixture(params=[0.0, 0.5, 2.0], ids=["flat gain", "uneven gain", "wild gain"])
def norm(request):
    generator = torch.Generator().manual_seed(1)
    norm = nn.RMSNorm(WIDTH, eps=1e-12, dtype=torch.float64)
    norm.weight.data = (request.param * torch.randn(WIDTH, generator=generator, dtype=torch.float64)).exp()
    return norm


def vectors(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def test_no_change_is_no_change(norm):
    current = 3 * vectors(5, 0)
    assert float(pull_back(norm, current, torch.zeros_like(current)).norm() / current.norm()) < 1e-6


@torch.no_grad()
def test_a_reachable_goal_is_reached_with_the_same_length(norm):
    current, other = 3 * vectors(5, 0), 7 * vectors(5, 1)
    moved = current + pull_back(norm, current, norm(other) - norm(current))
    torch.testing.assert_close(norm(moved), norm(other), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved.norm(dim=-1), current.norm(dim=-1))


def test_an_unreachable_goal_is_come_as_near_as_possible(norm):
    """The slow twin: gradient descent over the directions p may take."""
    current = vectors(4, 0)
    change = 1.5 * norm(current).detach() + 0.3 * vectors(4, 2)  # longer than any output of the norm
    with torch.no_grad():
        goal = norm(current) + change
        ours = (norm(current + pull_back(norm, current, change)) - goal).norm(dim=-1)
    free = goal.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.03)
    for _ in range(1500):
        optimizer.zero_grad()
        distance = (norm(free) - goal).norm(dim=-1)
        distance.sum().backward()
        optimizer.step()
    assert (ours <= distance.detach() + 1e-4).all()


def test_only_root_mean_square_norms_can_be_described():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.ffn, self.norm = nn.Linear(4, 4), nn.Linear(8, 4), nn.LayerNorm(4)

    model = nn.Module()
    model.layers = nn.ModuleList([Layer()])
    with pytest.raises(UnknownArchitectureError, match="root-mean-square"):
        Sites.of(model, Architecture("layers", "attn", "ffn", ffn_norm="norm"))

"""λ by the bound on the change of preserved values."""

from __future__ import annotations

import pytest
import torch

from pmet_lightning.solver.bounded import mean_square, solve_bounded
from pmet_lightning.solver.update import solve_update
from pmet_lightning.solver.weight_delta import WeightDelta

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


@pytest.fixture(scope="module")
def system():
    """Residuals, keys, second moment and weight of a layer."""
    samples = random(200, 12) @ random(12, 12)
    return random(5, 7), random(5, 12), samples.T @ samples / 200, random(7, 12), samples


def test_mean_square_is_that_of_the_values(system):
    _, _, moment, weight, samples = system
    expected = (samples @ weight.T).square().sum(dim=1).mean()
    assert mean_square(WeightDelta(weight), moment) == pytest.approx(float(expected))
    left, right = random(3, 7), random(3, 12)
    dense = mean_square(WeightDelta(left.T @ right), moment)
    assert mean_square(WeightDelta(right, left), moment) == pytest.approx(dense)


@pytest.mark.parametrize("bound", [0.5, 0.1, 0.01, 1e-4, 1e-8])
def test_the_change_is_just_below_the_bound(bound, system):
    residual, keys, moment, weight, _ = system
    values = mean_square(WeightDelta(weight), moment)
    solves = []

    def solve(lam):
        solves.append(lam)
        return solve_update(residual, keys, moment, lam)

    solution, lam = solve_bounded(solve, lambda s: mean_square(s.delta, moment) / values, 1e-3, bound)
    assert torch.equal(solution.delta_OI, solve_update(residual, keys, moment, lam).delta_OI)
    found = mean_square(solution.delta, moment) / values
    assert 0.98 * bound <= found <= bound or (lam == 1e-3 and found <= bound)
    assert len(solves) <= 16


def test_a_lam_that_keeps_the_bound_is_left_alone(system):
    residual, keys, moment, weight, _ = system
    _, lam = solve_bounded(
        lambda lam: solve_update(residual, keys, moment, lam), lambda s: mean_square(s.delta, moment), 7.0, 1e9
    )
    assert lam == 7.0


def test_a_bound_that_nothing_keeps_is_an_error(system):
    residual, keys, moment, _, _ = system
    with pytest.raises(FloatingPointError, match="no λ"):
        solve_bounded(lambda lam: solve_update(residual, keys, moment, lam), lambda s: 1.0, 1.0, 0.5)

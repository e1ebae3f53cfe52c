"""What the write of one weight preserves, and the ways to solve for the update."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pmet_lightning.solver.cholesky import factorize
from pmet_lightning.solver.null_space import null_space, solve_in_null_space
from pmet_lightning.solver.update import solve_update
from pmet_lightning.write.preserved import Preserved
from tests.solver.test_update import conditioned, exact, problem

PLACE, CPU = ("ffn", 0), torch.device("cpu")


@pytest.mark.parametrize("past", [0, 4, 9])
@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("n", [3, 20])
def test_earlier_keys_and_prompts_join_the_equation(n, past, rest):
    """By the explicit inverse, for several λ in turn, from keys and from their products; few keys, by the factor."""
    residual, keys, moment = problem(n, 16, 4)
    generator, factors = torch.Generator().manual_seed(2), []
    past_PI, rest_XI = (torch.randn(rows, 16, generator=generator, dtype=torch.float64) for rows in (past, 9))

    def factor(_):
        factors.append(1)
        return factorize(moment.clone)

    moments = SimpleNamespace(moment=lambda _: moment, factor=factor)
    weighted_II = 0.3 * rest_XI.T @ rest_XI
    preserved = Preserved(PLACE, moments, CPU, None, past_PI if past else None, weighted_II.clone() if rest else None)
    for lam in (3.0, 50.0, 3.0):
        system = lam * moment + keys.T @ keys + past_PI.T @ past_PI + rest * weighted_II
        expected = residual.T @ keys @ torch.inverse(system)
        for found in (
            preserved.update(residual, keys, lam),
            preserved.update_from_sums(residual.T @ keys, keys.T @ keys, lam),
        ):
            torch.testing.assert_close(found.delta_OI, expected, rtol=1e-8, atol=1e-10)
    assert bool(factors) == (n + past <= 8 and not rest)
    few = preserved.update(residual, keys, 3.0).delta
    assert few.rank in (None, n), "earlier facts add nothing to the rank"


def test_earlier_keys_are_projected_onto_the_null_space_of_c():
    """What they add does not move it: general text alone decides."""
    residual, keys, moment = problem(6, 16, 4)
    seen = []

    def space(place, share):
        seen.append((place, share))
        return null_space(moment, share)

    preserved = Preserved(PLACE, SimpleNamespace(null_space=space), CPU, 0.3, keys[:3])
    found = preserved.update(residual[3:], keys[3:], 2.0)
    expected = solve_in_null_space(residual[3:], keys[3:], null_space(moment, 0.3), 2.0, keys[:3].T @ keys[:3])
    torch.testing.assert_close(found.delta_OI, expected.delta_OI, rtol=1e-9, atol=1e-11)
    assert seen == [(PLACE, 0.3)]


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("reached", [False, True])
def test_the_way_that_works_is_taken(n, reached, monkeypatch, caplog):
    """The factor for few edits, the direct solve for many and where the factor does not serve."""
    caplog.set_level("INFO")
    residual, keys, moment = conditioned(n, 24, 1e4)
    if reached:
        moment[:3] = moment[:, :3] = 0
    calls = []
    monkeypatch.setattr(
        "pmet_lightning.write.preserved.solve_update", lambda *given: calls.append(1) or solve_update(*given)
    )
    moments = SimpleNamespace(moment=lambda _: moment, factor=lambda _: factorize(moment.clone))
    keys[:, :3] = torch.randn(n, 3, dtype=torch.float64)
    found = Preserved(PLACE, moments, CPU).update(residual, keys, 60.0)
    assert len(calls) == (n > 12 or reached)
    assert ("solving without it" in caplog.text) == (n < 12 and reached)
    torch.testing.assert_close(found.delta_OI, exact(residual, keys, moment, 60.0), rtol=1e-8, atol=1e-10)

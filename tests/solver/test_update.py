"""The closed form against plain linear algebra, and the pure pieces of the objective."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pmet_lightning.data.token_rows import IGNORE
from pmet_lightning.evaluation.probes import harmonic_mean
from pmet_lightning.model.scoring import kl_divergence, target_scores
from pmet_lightning.solver.cholesky import Factor, factorize
from pmet_lightning.solver.null_space import null_space, solve_in_null_space
from pmet_lightning.solver.update import multiply_transposed, solve_sums, solve_update, solve_with_factor
from pmet_lightning.targets.loss import norm_penalty, project_to_ball
from pmet_lightning.write.residual import residual_share
from tests.conftest import ROOT


def problem(n: int, width: int, out: int):
    generator = torch.Generator().manual_seed(n)
    keys = torch.randn(n, width, generator=generator, dtype=torch.float64)
    residual = torch.randn(n, out, generator=generator, dtype=torch.float64)
    samples = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    return residual, keys, samples.T @ samples / len(samples)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_equals_the_explicit_inverse(n):
    residual, keys, moment = problem(n, 16, 6)
    solution = solve_update(residual, keys, moment, 3.0)
    expected = residual.T @ keys @ torch.inverse(3.0 * moment + keys.T @ keys)
    torch.testing.assert_close(solution.delta_OI, expected, rtol=1e-10, atol=1e-12)
    assert solution.ridge == 0
    assert solution.solve_error < 1e-12


def inverse(residual, keys, moment, lam):
    """The slow obvious twin, as other editors have it."""
    return residual.T @ keys @ torch.inverse(lam * moment + keys.T @ keys)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_sums_serve_as_well_as_keys(n):
    residual, keys, moment = problem(n, 16, 6)
    parts = [(residual[i::3], keys[i::3]) for i in range(3)]  # as three processes have them, some of them nothing
    right = torch.stack([multiply_transposed(e, k) for e, k in parts]).sum(dim=0)
    solution = solve_sums(right, torch.stack([multiply_transposed(k, k) for _, k in parts]).sum(dim=0), moment, 3.0)
    torch.testing.assert_close(solution.delta_OI, inverse(residual, keys, moment, 3.0), rtol=1e-10, atol=1e-12)
    assert solution.solve_error < 1e-12
    with pytest.raises(FloatingPointError, match="residual of the solve is not finite"):
        solve_sums(right * float("nan"), keys.T @ keys, moment, 3.0)


@pytest.mark.parametrize("n", [1, 5, 40, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [7, 64, 1000])
def test_blocks_change_nothing(n, dtype, block, monkeypatch):
    monkeypatch.setattr("pmet_lightning.solver.update.BLOCK", block)
    monkeypatch.setattr("pmet_lightning.solver.update.BLOCK_KEYS", block)
    given = [tensor.to(dtype) for tensor in problem(n, 130, 50)]
    given[2] = given[2].tril() + given[2].tril(-1).T
    before = [tensor.clone() for tensor in given]
    expected = inverse(*(tensor.double() for tensor in given), 3.0)
    factor = factorize(lambda: given[2].to(torch.float64, copy=True))
    for found in (solve_update(*given, 3.0), solve_with_factor(*given[:2], factor, 3.0)):
        torch.testing.assert_close(found.delta_OI, expected, rtol=1e-8, atol=1e-10)
        assert found.delta_OI.is_contiguous()
    assert all(torch.equal(tensor, old) for tensor, old in zip(given, before, strict=True))


@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("lam", [0.5, 300.0])
def test_a_stored_factor_gives_the_same_update(n, lam):
    residual, keys, moment = problem(n, 16, 6)
    direct = solve_update(residual, keys, moment, lam)
    factor = factorize(moment.clone)
    found = solve_with_factor(residual, keys, factor, lam)
    assert found.ridge == factor.ridge == 0
    torch.testing.assert_close(found.delta_OI, direct.delta_OI, rtol=1e-9, atol=1e-11)
    assert found.solve_error < 1e-11
    with pytest.raises(FloatingPointError, match="keys"):
        solve_with_factor(residual, keys * float("nan"), factor, lam)


def test_the_null_space_is_left_to_its_keys():
    """AlphaEdit's form with projectors, and what it promises: preserved keys see nothing of the update."""
    residual, keys, _ = problem(6, 12, 4)
    preserved = torch.randn(100, 7, dtype=torch.float64) @ torch.randn(7, 12, dtype=torch.float64)
    moment = preserved.T @ preserved / 100
    moment += 1e-3 * torch.eye(12, dtype=torch.float64)
    lam, ridge = 3.0, float(torch.linalg.eigvalsh(moment)[:5].mean())
    found = solve_in_null_space(residual, keys, null_space(moment, 1e-3), lam)
    vectors = torch.linalg.eigh(moment).eigenvectors[:, :5]
    projector = vectors @ vectors.T
    system = projector @ keys.T @ keys + lam * ridge * torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.solve(system, projector @ keys.T @ residual).T
    torch.testing.assert_close(found.delta_OI, expected, rtol=1e-8, atol=1e-10)
    assert (preserved @ found.delta_OI.T).norm() < 1e-4 * (keys @ found.delta_OI.T).norm()
    basis, mean = null_space(moment, 1e-3)
    assert basis.shape == (12, 5)
    assert mean == pytest.approx(ridge)
    with pytest.raises(ValueError, match="make --spread.null_space larger"):
        null_space(torch.eye(4), 0.1)


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("n", [2, 40])
def test_past_keys_join_the_system_in_the_null_space(n, past):
    """AlphaEdit in its own form, for fewer edits than directions (8) and for more."""
    residual, keys, _ = problem(n, 16, 6)
    generator = torch.Generator().manual_seed(1)
    scales = torch.cat([torch.full((8,), 0.01), torch.ones(8)]).double()
    samples = torch.randn(300, 16, generator=generator, dtype=torch.float64) * scales
    moment = samples.T @ samples / 300
    earlier = torch.randn(9 if past else 0, 16, generator=generator, dtype=torch.float64)
    past_II = earlier.T @ earlier
    eigenvalues, vectors = torch.linalg.eigh(moment)
    assert len(null_space(moment, 1e-3).basis_IR.T) == 8
    projector, mean, lam = vectors[:, :8] @ vectors[:, :8].T, float(eigenvalues[:8].mean()), 3.0
    system = past_II @ projector + keys.T @ keys @ projector + lam * mean * torch.eye(16, dtype=torch.float64)
    expected = residual.T @ keys @ projector @ torch.inverse(system)
    found = solve_in_null_space(residual, keys, null_space(moment, 1e-3), lam, past_II if past else None)
    torch.testing.assert_close(found.delta_OI, expected, rtol=1e-8, atol=1e-10)
    if not past:  # what a single edit batch gets, as it was before there were past keys
        basis = vectors[:, :8]
        inside = torch.eye(8, dtype=torch.float64) * mean
        before = solve_update(residual, keys @ basis, inside, lam).delta_OI @ basis.T
        torch.testing.assert_close(found.delta_OI, before, rtol=1e-10, atol=1e-12)


def test_minimises_what_it_should():
    """ΔW minimises Σ‖ΔW k − e‖² + λ tr(ΔW C ΔWᵀ): no small step in any direction is better."""
    residual, keys, moment = problem(5, 8, 4)
    delta = solve_update(residual, keys, moment, 2.0).delta_OI

    def loss(w):
        return ((keys @ w.T - residual) ** 2).sum() + 2.0 * torch.trace(w @ moment @ w.T)

    for _ in range(50):
        assert loss(delta) <= loss(delta + 1e-3 * torch.randn_like(delta))


def test_dead_dimensions_get_a_ridge():
    residual, keys, moment = problem(5, 16, 6)
    keys[:, 3] = 0
    moment[3] = moment[:, 3] = 0
    solution = solve_update(residual, keys, moment, 3.0)
    assert solution.ridge > 0
    assert solution.delta_OI.isfinite().all()
    alive = [i for i in range(16) if i != 3]
    reduced = solve_update(residual, keys[:, alive], moment[alive][:, alive], 3.0).delta_OI
    torch.testing.assert_close(solution.delta_OI[:, alive], reduced, rtol=1e-6, atol=1e-9)


def conditioned(n: int, width: int, condition: float, out: int = 12):
    """Keys drawn from the distribution that C is the second moment of."""
    generator = torch.Generator().manual_seed(n)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    root = turn * torch.logspace(0, -math.log10(condition) / 2, width, dtype=torch.float64)
    moment = root @ root.T
    keys = torch.randn(n, width, generator=generator, dtype=torch.float64) @ root.T
    return torch.randn(n, out, generator=generator, dtype=torch.float64), keys, (moment + moment.T) / 2


def exact(residual, keys, moment, lam):
    """Refined with residuals in extended precision until nothing changes."""
    wide = [tensor.numpy().astype(np.longdouble) for tensor in (residual, keys, moment)]
    factor = torch.linalg.cholesky(lam * moment + keys.T @ keys)
    solution = np.zeros((moment.shape[0], residual.shape[1]), np.longdouble)
    for _ in range(20):
        left = lam * (wide[2] @ solution) + wide[1].T @ (wide[1] @ solution)
        rest = torch.from_numpy((wide[1].T @ wide[0] - left).astype(np.float64))
        solution += torch.cholesky_solve(rest, factor).numpy()
    return torch.from_numpy(solution.T.astype(np.float64))


@pytest.mark.parametrize("condition", [1e6, 1e8, 1e10])
@pytest.mark.parametrize("n", [4, 100])
def test_a_badly_conditioned_moment(condition, n):
    """The error is what the condition allows; of the system itself nothing is left."""
    given = conditioned(n, 64, condition)
    expected = exact(*given, 100.0)
    for found in (solve_update(*given, 100.0), solve_with_factor(*given[:2], factorize(given[2].clone), 100.0)):
        assert float((found.delta_OI - expected).norm() / expected.norm()) < 1e-16 * condition
        assert found.solve_error < 1e-10
        assert found.ridge == 0


@pytest.mark.parametrize("n", [4, 100])
def test_the_error_is_near_the_whole_one(n):
    given = residual, keys, moment = conditioned(n, 64, 1e8, out=40)
    for found in (solve_update(*given, 9.0), solve_with_factor(*given[:2], factorize(moment.clone), 9.0)):
        left = 9.0 * found.delta_OI @ moment + found.delta_OI @ keys.T @ keys
        whole = float((left - residual.T @ keys).norm() / (residual.T @ keys).norm())
        assert found.solve_error == pytest.approx(whole, rel=0.8)


def test_a_wrong_factor_is_noticed():
    residual, keys, moment = problem(5, 16, 6)
    good = factorize(moment.clone)
    keys[:, 3] *= 1e9  # edits that reach far into where C has next to nothing
    with pytest.raises(FloatingPointError, match="too singular"):
        solve_with_factor(residual, keys, Factor(good.lower_II * torch.logspace(0, -12, 16), 0.0), 1.0)
    good.lower_II[5, 2] = float("nan")
    with pytest.raises(FloatingPointError):
        solve_with_factor(residual, keys, good, 1.0)


@pytest.mark.parametrize("reached", [False, True])
def test_dead_dimensions_with_a_factor(reached, caplog):
    """Right where edits leave them alone; refused, for the direct solve to do, where they do not."""
    residual, keys, moment = conditioned(5, 24, 1e4)
    moment[:3] = moment[:, :3] = 0
    keys[:, :3] = torch.randn(5, 3, dtype=torch.float64) if reached else 0
    factor = factorize(moment.clone)
    assert factor.ridge > 0
    if reached:
        with pytest.raises(FloatingPointError, match="too singular"):
            solve_with_factor(residual, keys, factor, 60.0)
        found = solve_update(residual, keys, moment, 60.0)
        assert found.solve_error < 1e-10
        expected = exact(residual, keys, moment, 60.0)
        torch.testing.assert_close(found.delta_OI, expected, rtol=1e-8, atol=1e-10)
    else:
        found = solve_with_factor(residual, keys, factor, 60.0)
        assert found.ridge == 60.0 * factor.ridge
        assert not found.delta_OI[:, :3].any()
        expected = inverse(residual, keys[:, 3:], moment[3:, 3:], 60.0)
        torch.testing.assert_close(found.delta_OI[:, 3:], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory of a process from /proc")
@pytest.mark.slow  # a process for each
@pytest.mark.parametrize(("path", "most"), [("update", 1.8), ("sums", 1.8), ("factor", 2.2)])
def test_memory(path, most):
    """1 + O/I times I² float64 numbers for the direct solves, less than 2 with a factor, and small blocks."""
    script = (
        "import sys, torch\n"
        "from pmet_lightning.solver import update as solve\n"
        "def status(name):\n"
        "    return next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith(name)) * 1024\n"
        "solve.BLOCK = solve.BLOCK_KEYS = 64\n"
        "width, count = 3072, 1875\n"
        "keys, residual = torch.randn(count, width), torch.randn(count, width // 4)\n"
        "moment = torch.eye(width, dtype=torch.float64 if sys.argv[1] == 'factor' else torch.float32)\n"
        "if sys.argv[1] == 'sums':\n"
        "    right, squares = solve.multiply_transposed(residual, keys), torch.eye(width, dtype=torch.float64)\n"
        "solve.solve_update(torch.ones(9, 64), torch.randn(9, 256), torch.eye(256), 1.0)\n"
        "before = status('VmRSS')\n"
        "if sys.argv[1] == 'update':\n"
        "    solve.solve_update(residual, keys, moment, 9.0)\n"
        "elif sys.argv[1] == 'sums':\n"
        "    solve.solve_sums(right, squares, moment, 9.0)\n"
        "else:\n"
        "    solve.solve_with_factor(residual, keys, solve.Factor(moment, 0.0), 9.0)\n"
        "print((status('VmHWM') - before) / 8 / width**2)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < most


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_refused(which, value):
    parts = list(problem(3, 8, 4))
    parts[which][0, 0] = value
    with pytest.raises(FloatingPointError, match=["residual", "keys", "second moment"][which]):
        solve_update(*parts, 1.0)


def test_shares():
    assert [residual_share(n, "sqrt") for n in (4, 1)] == [0.5, 1.0]
    assert [residual_share(n, "even") for n in (4, 1)] == [0.25, 1.0]


def test_target_scores_against_cross_entropy():
    logits = torch.randn(2, 3, 11)
    labels = torch.tensor([[1, 2, 3], [4, IGNORE, IGNORE]])
    logits[1, 0, 4] = 99
    scores = target_scores(logits, labels)
    for row, count in ((0, 3), (1, 1)):
        expected = F.cross_entropy(logits[row, :count], labels[row, :count])
        torch.testing.assert_close(scores.nll[row], expected)
    assert bool(scores.all_argmax[1])
    hits = (logits[0].argmax(-1) == labels[0]).float()
    assert float(scores.token_accuracy[0]) == pytest.approx(float(hits.mean()))
    assert bool(scores.all_argmax[0]) == bool(hits.all())


def test_kl_against_torch():
    p, q = (torch.randn(3, 7).log_softmax(-1) for _ in range(2))
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(p, q), expected)


def test_norm_penalty_is_norm_over_square():
    assert float(norm_penalty(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]))) == 5 / 4


def test_norm_penalty_has_a_gradient_at_zero():
    delta = torch.zeros(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm_penalty(delta, torch.ones(2, 3)).sum(), delta)
    assert torch.equal(gradient, torch.zeros(2, 3))


def test_projection():
    delta = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    projected = project_to_ball(delta, torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(projected, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_harmonic_mean():
    assert float(harmonic_mean(torch.tensor([50.0, 100.0, 100.0]))) == pytest.approx(75.0)
    assert float(harmonic_mean(torch.tensor([0.0, 100.0]))) == 0.0
    assert math.isfinite(float(harmonic_mean(torch.tensor([1e-9, 1.0]))))


@pytest.fixture(scope="module")
def golden():
    """What the authors' program computed at the lowest of three layers of a tiny GPT-2, float64 (8 requests)."""
    with np.load(ROOT / "tests/golden/closed_form.npz") as numbers:
        return {name: torch.from_numpy(numbers[name]) for name in numbers.files}


@pytest.mark.parametrize(("method", "rule"), [("pmet", "sqrt"), ("memit", "even")])
def test_golden_update(golden, method, rule):
    keys = golden[f"{method}/keys"]
    width = keys.shape[1]
    moment = torch.zeros(width, width)
    moment[tuple(torch.tril_indices(width, width))] = golden["moment_lower"]
    moment = moment + moment.tril(-1).T
    residual = residual_share(3, rule) * golden[f"{method}/residual"]
    delta = solve_update(residual, keys, moment, float(golden["lam"])).delta_OI
    assert (delta - golden[f"{method}/delta"]).norm() <= 1e-10 * golden[f"{method}/delta"].norm()


@pytest.mark.parametrize("i", range(8))
def test_golden_norm_term(golden, i):
    found = norm_penalty(golden[f"penalty/{i}/delta"], golden[f"penalty/{i}/clean"]).sum()
    torch.testing.assert_close(golden["norm_factor"] * found, golden[f"penalty/{i}/wd"], rtol=1e-12, atol=0)

"""One update ΔW = E Kᵀ (λC + KKᵀ)⁻¹: ours compared with the explicit inverse in float64 of other editors.

    python benchmarks/solve.py [--widths 2048 4096] [--counts 10 100 1000 10000] [--repeat 5]

C has eigenvalues from 1 to 1e-6, keys are drawn from the distribution that it is the second moment of, O = I / 4, λ is
6,000; C, keys and residual are float32. Ours is the method that WeightSpread selects for the number of edits; the
factor of C is kept by the moment store, so its time is shown once and not included. Errors are those of 8 outputs,
relative to a float64 Cholesky solve refined with residuals in extended precision (80 bits on x86). "float32, refined",
a float32 Cholesky with residuals in float64 until 1e-10, is included to show that it does not pay; it is not part of
the package.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pmet_lightning.solver.cholesky import Factor, factorize
from pmet_lightning.solver.update import solve_update, solve_with_factor
from pmet_lightning.write.weight_spread import FEW_EDITS

LAM, CONDITION, OUTPUTS_CHECKED = 6000.0, 1e6, 8
Problem = tuple[Tensor, Tensor, Tensor]


def distribution(width: int) -> tuple[Tensor, Tensor]:
    """C with a decaying spectrum, float32, and a square root of it, float64."""
    rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    decay = torch.logspace(0, -np.log10(CONDITION) / 2, width, dtype=torch.float64)
    root = rotation * decay
    moment = (root @ root.T).float()
    return moment.tril() + moment.tril(-1).T, root


def explicit_inverse(residual: Tensor, keys: Tensor, moment: Tensor) -> Tensor:
    """The update as other editors compute it."""
    keys, residual = keys.double(), residual.double()
    return residual.T @ keys @ torch.inverse(LAM * moment.double() + keys.T @ keys)


def plain_solve(residual: Tensor, keys: Tensor, moment: Tensor) -> Tensor:
    """torch.linalg.solve of the same system."""
    keys, residual = keys.double(), residual.double()
    return torch.linalg.solve(LAM * moment.double() + keys.T @ keys, keys.T @ residual).T


def refined(residual: Tensor, keys: Tensor, moment: Tensor) -> Tensor:
    """Cholesky in float32, refined in float64; NaN if it does not converge."""
    factor, failed = torch.linalg.cholesky_ex(LAM * moment + keys.T @ keys)
    keys, residual, moment = keys.double(), residual.double(), moment.double()
    right = rest = keys.T @ residual
    delta = torch.zeros_like(right)
    for _ in range(0 if int(failed) else 30):
        step = torch.cholesky_solve(rest.float(), factor).double()
        delta += step
        if float(step.norm() / delta.norm()) < 1e-10:
            return delta.T
        rest = right - LAM * (moment @ delta) - keys.T @ (keys @ delta)
    return torch.full_like(delta.T, torch.nan)


def oracle(residual: Tensor, keys: Tensor, moment: Tensor) -> np.ndarray:
    """The first outputs of ΔW, refined until the corrections no longer shrink."""
    wide_keys, wide_moment, wide_residual = (
        tensor.numpy().astype(np.longdouble) for tensor in (keys, moment, residual[:, :OUTPUTS_CHECKED])
    )
    factor = torch.linalg.cholesky(LAM * moment.double() + keys.double().T @ keys.double())
    right = wide_keys.T @ wide_residual
    solution, last = np.zeros_like(right), np.inf
    while True:
        rest = right - LAM * (wide_moment @ solution) - wide_keys.T @ (wide_keys @ solution)
        step = torch.cholesky_solve(torch.from_numpy(rest.astype(np.float64)), factor).numpy()
        size = float(np.linalg.norm(step) / max(np.linalg.norm(solution), 1e-300))
        if size >= last:
            return solution.T
        solution, last = solution + step, size


def error(delta: Tensor, expected: np.ndarray) -> float:
    """Relative error of the outputs that are checked."""
    return float(np.linalg.norm(delta[:OUTPUTS_CHECKED].numpy() - expected) / np.linalg.norm(expected))


def methods(factor: Factor, few: bool) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The methods that are compared; the first is the one that a run uses."""

    def direct(residual: Tensor, keys: Tensor, moment: Tensor) -> Tensor:
        return solve_update(residual, keys, moment, LAM).delta_OI

    def stored(residual: Tensor, keys: Tensor, _: Tensor) -> Tensor:
        return solve_with_factor(residual, keys, factor, LAM).delta_OI

    return {
        **({"ours, with the factor": stored} if few else {}),
        "ours, direct": direct,
        "explicit inverse": explicit_inverse,
        "torch.linalg.solve": plain_solve,
        "float32, refined": refined,
    }


def compare(problem: Problem, factor: Factor, repeat: int) -> None:
    """Measure all methods alternately, and print a line for each."""
    residual, keys, moment = problem
    count, width = keys.shape
    compared = methods(factor, count <= FEW_EDITS * width)
    expected = oracle(*problem)
    errors = {name: error(method(*problem), expected) for name, method in compared.items()}
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(repeat):
        for name, method in compared.items():
            start = time.perf_counter()
            method(*problem)
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        ratio = statistics.median(b / t for b, t in zip(seconds["explicit inverse"], times, strict=True))
        sys.stdout.write(
            f"d_k {width}, N {count:>6}  {name:22} {statistics.median(times):8.4f} s  {ratio:6.2f} x  "
            f"error {errors[name]:.1e}\n"
        )
        sys.stdout.flush()


def machine() -> str:
    """Model name of the processor, and what else the times depend on."""
    path, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    lines = path.read_text().splitlines() if path.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    """Compare at all widths and counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100, 1000, 10000])
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    sys.stdout.write(f"{machine()}, medians of {options.repeat}, x: times as fast as the explicit inverse\n")
    for width in options.widths:
        torch.manual_seed(0)
        moment, root = distribution(width)
        start = time.perf_counter()
        factor = factorize(moment.double)
        sys.stdout.write(f"d_k {width}: the factor of C takes {time.perf_counter() - start:.2f} s, once\n")
        for count in options.counts:
            keys = (torch.randn(count, width, dtype=torch.float64) @ root.T).float()
            compare((torch.randn(count, width // 4), keys, moment), factor, options.repeat)


if __name__ == "__main__":
    main()

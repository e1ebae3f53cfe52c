"""How close to the rate of a large matrix product the layers of the shipped model come by themselves.

    python benchmarks/bound.py [--rows 268] [--tokens 5] [--repeat 15]

Value and gradient of the layers above L of Atlas, as the package loads them and as torch.compile fuses them, without
anything that the target optimization adds: no deltas, padding, tokens before the subject, vocabulary head, loss or
Adam. Their share of the rate shows how much of its floor ``benchmarks/targets.py`` could reach at this size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
import transformers
from targets import LAYER, matrix_rate
from torch import Tensor

from pmet_lightning.model.loading import load_model


def main() -> None:
    """Time both alternately."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=268, help="67 edits of four rows")
    parser.add_argument("--tokens", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    model: Any = load_model("atlas")
    layers = model.transformer.h[LAYER["atlas"] + 1 :]
    positions = torch.arange(options.tokens).expand(options.rows, -1)
    entering = torch.randn(options.rows, options.tokens, model.config.n_embd)

    def stack(hidden: Tensor) -> Tensor:
        for layer in layers:
            output = layer(hidden, position_ids=positions)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def run(version: object) -> Tensor:
        hidden = entering.clone().requires_grad_()
        return torch.autograd.grad(version(hidden).sum(), hidden)[0]  # type: ignore[operator]

    versions = {"as they are": stack, "compiled": torch.compile(stack)}
    start = time.perf_counter()
    torch.testing.assert_close(run(versions["compiled"]), run(stack), rtol=1e-4, atol=1e-4)
    compiling = time.perf_counter() - start
    times: dict[str, list[float]] = {name: [] for name in versions}
    for _ in range(options.repeat):
        for name, version in versions.items():
            start = time.perf_counter()
            run(version)
            times[name].append(time.perf_counter() - start)
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    floor = 2 * 2 * weights * options.rows * options.tokens / matrix_rate("float32", 5)
    for name, seconds in times.items():
        median = statistics.median(seconds)
        sys.stdout.write(f"{len(layers)} layers {name}: {median * 1e3:.0f} ms, {floor / median:.0%} of the floor\n")
    sys.stdout.write(f"compiling took {compiling:.0f} s\n")


if __name__ == "__main__":
    main()

"""Second moments of six layers: one early-exit pass for all of them, compared with a plain full pass for each.

    python benchmarks/stats.py [--repeat 5]

A random GPT-2 of 12 layers x 768 with 5,000 tokens, layers 3 to 8, float32, the same packed rows for both.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from pmet_lightning.data.token_rows import TokenRow
from pmet_lightning.model.architectures import ARCHITECTURES
from pmet_lightning.model.projections import Sites
from pmet_lightning.moments.sums import MomentSums
from pmet_lightning.solver.packed import symmetrize

LAYERS = range(3, 9)
ROWS, LENGTH, AT_ONCE = 16, 128, 16


def setting() -> tuple[torch.nn.Module, Sites, list[TokenRow]]:
    """The model, its modules, and the rows."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=768, n_layer=12, n_head=12, n_positions=LENGTH, vocab_size=5000)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = [TokenRow(torch.randint(5000, (LENGTH,)).tolist()) for _ in range(ROWS)]
    return model, Sites.of(model, ARCHITECTURES["gpt2"]), rows


def ours(model: torch.nn.Module, sites: Sites, rows: list[TokenRow]) -> dict[int, torch.Tensor]:
    """All layers in one pass."""
    sums = MomentSums(model, sites, [("ffn", layer) for layer in LAYERS], pad_id=0, device=torch.device("cpu"))
    for start in range(0, len(rows), AT_ONCE):
        sums.add(rows[start : start + AT_ONCE])
    return {layer: symmetrize(sums.lower["ffn", layer]) for layer in LAYERS}


@torch.no_grad()
def plain(model: torch.nn.Module, sites: Sites, rows: list[TokenRow]) -> dict[int, torch.Tensor]:
    """One layer at a time, through the whole model."""
    found = {}
    for layer in LAYERS:
        module = sites.module("ffn", layer)
        total = torch.zeros(3072, 3072, dtype=torch.float64)

        def hook(_: torch.nn.Module, inputs: tuple, total: torch.Tensor = total) -> None:
            keys = inputs[0].flatten(0, 1)
            total += keys.T @ keys

        handle = module.register_forward_pre_hook(hook)
        for start in range(0, len(rows), AT_ONCE):
            model(torch.tensor([row.ids for row in rows[start : start + AT_ONCE]]), use_cache=False)
        handle.remove()
        found[layer] = total
    return found


def main() -> None:
    """Measure both alternately, and the peak memory of each in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--peak", choices=["ours", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    methods = {"ours": ours, "plain": plain}
    if options.peak:
        methods[options.peak](*setting())
        sys.stdout.write(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
        return
    # Before this process grows: the peak of a child starts at the size of its parent.
    peaks = {
        name: int(subprocess.run([sys.executable, __file__, "--peak", name], capture_output=True, check=True).stdout)
        for name in methods
    }
    inputs = setting()
    first = {name: method(*inputs) for name, method in methods.items()}
    error = max(float((first["ours"][i] - c).norm() / c.norm()) for i, c in first["plain"].items())
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(options.repeat):
        for name, method in methods.items():
            start = time.perf_counter()
            method(*inputs)
            seconds[name].append(time.perf_counter() - start)
    out = sys.stdout.write
    out(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    for name, times in seconds.items():
        rate = ROWS * LENGTH / statistics.median(times)
        out(f"{name}: {rate:.0f} tokens/s, median of {options.repeat}, peak {peaks[name] / 2**20:.2f} GiB\n")
    ratio = statistics.median(p / o for o, p in zip(seconds["ours"], seconds["plain"], strict=True))
    out(f"ratio {ratio:.1f}, relative difference of the moments {error:.1e}\n")


if __name__ == "__main__":
    main()

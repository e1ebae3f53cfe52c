"""How long 10,000 edits of a large model take on one device: every phase is measured on fewer edits, then added up.

    python benchmarks/large.py                                        # a small shape, on any device
    python benchmarks/large.py --shape gptj-6b --device cuda --dtype bfloat16 --edits 512

The model has the given shape and random weights, the tokenizer is the shipped one, six layers are edited. Target
vectors take all of their steps; the plain implementation (benchmarks/plain.py) runs one edit at a time through the
whole model. Second moments are timed over random tokens and extrapolated to ``TOKENS`` tokens per key dimension (where
``samples: auto`` stops on Atlas). Solves use the method that WeightSpread selects for this number of edits. Loading,
evaluation and the patch are not included.
"""

from __future__ import annotations

import argparse
import logging
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from plain import plain_target
from targets import CONTEXTS, NO_STOP, InTrainer

from pmet_lightning import TargetOptimizer
from pmet_lightning.data.readers import read_edits
from pmet_lightning.data.records import Edit
from pmet_lightning.data.token_rows import TokenRow
from pmet_lightning.editor.isolation import preserve_caller_state
from pmet_lightning.model.projections import in_features
from pmet_lightning.moments.sums import MomentSums
from pmet_lightning.solver.cholesky import factorize
from pmet_lightning.solver.update import multiply_transposed, solve_update, solve_with_factor
from pmet_lightning.utils.resources import locate
from pmet_lightning.write.keys import KeyRows, measure_keys
from pmet_lightning.write.weight_spread import FEW_EDITS

SHAPES: dict[str, dict[str, int]] = {
    "small": {"n_embd": 256, "n_layer": 8, "n_head": 8, "rotary_dim": 32, "vocab_size": 5000},
    "gptj-6b": {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "vocab_size": 50400},
}
LAYERS = {"small": [0, 1, 2, 3, 4, 5], "gptj-6b": [3, 4, 5, 6, 7, 8]}
SETTINGS = {"steps": 20, "lr": 0.1, "clamp": 0.75}
TARGET_EDITS, TOKENS, LAM = 10_000, 20, 6000.0
ROW, AT_ONCE = 512, 16


class Clock:
    """Times work on a device, until the device has finished it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long some work takes."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def peak(self) -> float:
        """Largest memory so far in GiB: the device's, or on a CPU the process's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def module_of(shape: str, device: torch.device, dtype: torch.dtype) -> TargetOptimizer:
    """The target optimization of a model with random weights."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(locate("atlas"))
    torch.manual_seed(0)
    config = transformers.GPTJConfig(n_positions=2048, bos_token_id=0, eos_token_id=0, **SHAPES[shape])
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    module = TargetOptimizer(
        shape,
        layers=LAYERS[shape],
        steps=SETTINGS["steps"],
        clamp=SETTINGS["clamp"],
        kl_factor=0.0625,
        norm_factor=0.1,
        contexts=CONTEXTS,
        optimizer=lambda params: torch.optim.Adam(params, lr=SETTINGS["lr"]),
        **NO_STOP,
    )
    module.attach(model, tokenizer)
    module.setup("fit")
    module.configure_model()
    module.to(device)
    module.contexts = CONTEXTS
    optimizer = module.configure_optimizers()
    module.optimizers = lambda: InTrainer(optimizer)  # type: ignore[method-assign]
    return module


def plain(module: TargetOptimizer, edits: list[Edit]) -> None:
    """Targets by the plain implementation, one edit after the other."""
    attn, ffn = (module.sites.module(site, module.target_layer) for site in ("attn", "ffn"))
    options = {**SETTINGS, **NO_STOP, "nll": 1.0, "kl": 0.0625, "norm": 0.1}
    with module.device:
        for edit in edits:
            plain_target(module.model, module.tokenizer, attn, ffn, edit, CONTEXTS, **options)


def keys(module: TargetOptimizer, edits: list[Edit]) -> None:
    """Keys and values of all layers, as the writes measure them."""
    rows = KeyRows.of(edits, CONTEXTS, module.encoder, module.tokens_per_batch, module.device)
    for layer in module.layers:
        ends = [("ffn", module.target_layer), ("hidden", module.target_layer)]
        measure_keys(module.model, module.sites, ("ffn", layer), ends, rows)


def moments(module: TargetOptimizer, rows: list[TokenRow]) -> None:
    """Second moments of all layers."""
    sums = MomentSums(module.model, module.sites, [("ffn", i) for i in module.layers], 0, module.device)
    for start in range(0, len(rows), AT_ONCE):
        sums.add(rows[start : start + AT_ONCE])


def solves(module: TargetOptimizer, count: int, clock: Clock) -> tuple[float, float]:
    """Seconds of computing one factor of C, if it is used, and of one solve."""
    ffn = module.sites.module("ffn", module.target_layer)
    width, device = in_features(ffn), module.device
    moment_II = multiply_transposed(*[torch.randn(2 * width, width, device=device)] * 2) / (2 * width)
    keys_NI, wanted_NO = torch.randn(count, width, device=device), torch.randn(count, module.width, device=device)
    if count > FEW_EDITS * width:
        return 0.0, clock.seconds(lambda: solve_update(wanted_NO, keys_NI, moment_II, LAM))
    factors = []
    once = clock.seconds(lambda: factors.append(factorize(moment_II.clone)))
    return once, clock.seconds(lambda: solve_with_factor(wanted_NO, keys_NI, factors[0], LAM))


def main() -> None:
    """Measure every phase, and add up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--edits", type=int, default=64, help="edits whose targets are optimized together; up to 840")
    parser.add_argument("--plain_edits", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens of the second moments that are timed")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    device, out = torch.device(options.device), sys.stdout.write
    clock = Clock(device)
    module = module_of(options.shape, device, getattr(torch, options.dtype))
    edits = read_edits(["atlas-records", "atlas-spare", "atlas-tuning"], limit=options.edits)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    out(f"{device_name}, torch {torch.__version__}, {options.shape}, {options.dtype}, {len(edits)} edits, ")
    out(f"{SETTINGS['steps']} steps, {len(CONTEXTS)} contexts, layers {module.layers}\n")
    with preserve_caller_state(module.model, device):
        module.find_targets(edits[:8])  # warm-up
        rate = len(edits) / clock.seconds(lambda: module.find_targets(edits))
        few = edits[: options.plain_edits]
        slow = len(few) / clock.seconds(lambda: plain(module, few))
        out(f"targets: ours {rate:.2f} edits/s, plain {slow:.3f} edits/s, ratio {rate / slow:.1f}\n")
        each = clock.seconds(lambda: keys(module, edits)) / len(edits)
        out(f"keys and values of {len(module.layers)} layers: {1 / each:.1f} edits/s\n")
        count = -(-options.tokens // ROW)
        rows = [TokenRow(row) for row in torch.randint(len(module.tokenizer), (count, ROW)).tolist()]
        read = count * ROW / clock.seconds(lambda: moments(module, rows))
        out(f"second moments of {len(module.layers)} layers: {read:,.0f} tokens/s\n")
    width, spent = in_features(module.sites.module("ffn", module.target_layer)), {}
    for count in (1000, TARGET_EDITS):
        once, solve = solves(module, count, clock)
        spent[count] = len(module.layers) * (once + solve)
        out(f"solve of {len(module.layers)} layers, N {count}, d_k {width}: {spent[count]:.1f} s\n")
    parts = {
        "targets": TARGET_EDITS / rate,
        "keys": TARGET_EDITS * each,
        "second moments": TOKENS * width / read,
        "solve": spent[TARGET_EDITS],
    }
    out(f"peak memory {clock.peak():.1f} GiB\n{TARGET_EDITS:,} edits: ")
    out(", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in parts.items()))
    out(f", together {sum(parts.values()) / 60:.1f} minutes; plain targets alone {TARGET_EDITS / slow / 60:.1f}\n")


if __name__ == "__main__":
    main()

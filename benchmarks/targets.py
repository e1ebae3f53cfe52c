"""Target vectors of many edits: ours against the method written plainly, one edit at a time through the whole model.

    python benchmarks/targets.py [--shapes atlas gptj gpt2] [--edits 64] [--plain_edits 4] [--repeat 5]

Same edits, same contexts, same number of steps (all of them: no edit stops early), and the same targets, which is
checked first. The plain twin is that of the tests (tests/plain.py); its time for an edit does not depend on how many
there are, so it gets a few. Shapes: atlas (the shipped model), gptj (8 layers of 512) and gpt2 (12 of 768) with random
weights and a vocabulary of 5,000.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the plain twin is no part of the package

from pmet_lightning import TargetOptimizer
from pmet_lightning.edits import Edit, read_edits
from pmet_lightning.resources import locate
from tests.plain import plain_target

SHAPES: dict[str, tuple[type[Any], dict[str, int]]] = {
    "gptj": (transformers.GPTJConfig, {"n_embd": 512, "n_layer": 8, "n_head": 8, "rotary_dim": 64}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 768, "n_layer": 12, "n_head": 12}),
}
LAYER = {"atlas": 2, "gptj": 3, "gpt2": 5}
CONTEXTS = ["The clock was closed for a week. {}", "Because it was late, the boat stayed. {}", "I like it. {}"]
SETTINGS = {"steps": 10, "lr": 0.1, "clamp": 3.0}
TOLERANCE = 1e-4


def model_folder(shape: str, base: str) -> str:
    """A folder with a model of the shape."""
    if shape == "atlas":
        return locate("atlas")
    tokenizer = transformers.AutoTokenizer.from_pretrained(locate("atlas"))
    kind, sizes = SHAPES[shape]
    config = kind(vocab_size=5000, n_positions=128, bos_token_id=0, eos_token_id=0, **sizes)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(f"{base}/{shape}")
    tokenizer.save_pretrained(f"{base}/{shape}")
    return f"{base}/{shape}"


class Bench:
    """One model, and both ways to find targets on it."""

    def __init__(self, shape: str, base: str, dtype: str) -> None:
        # No rule may stop an edit early: equal work on both sides.
        self.module = TargetOptimizer(
            model_folder(shape, base),
            layers=[LAYER[shape]],
            steps=SETTINGS["steps"],
            clamp=SETTINGS["clamp"],
            kl_factor=0.0625,
            norm_factor=0.1,
            target_value="stored",
            loss_tolerance=0.0,
            contexts=CONTEXTS,
            dtype=dtype,
            optimizer=lambda params: torch.optim.Adam(params, lr=SETTINGS["lr"]),
        )
        self.module.setup("fit")
        self.module.configure_model()
        self.module.contexts = CONTEXTS
        optimizer = self.module.configure_optimizers()
        self.module.optimizers = lambda: _Plain(optimizer)  # type: ignore[method-assign]

    def ours(self, edits: list[Edit]) -> list[torch.Tensor]:
        """All edits together."""
        return [target.values["ffn"] for target in self.module.optimise(edits)]

    def plain(self, edits: list[Edit]) -> list[torch.Tensor]:
        """One edit after the other."""
        sites, layer = self.module.sites, self.module.target_layer
        modules = sites.module("attn", layer), sites.module("ffn", layer)
        factors = {"nll": 1.0, "kl": 0.0625, "norm": 0.1}
        model, tokenizer = self.module.model, self.module.tokenizer
        return [plain_target(model, tokenizer, *modules, e, CONTEXTS, **SETTINGS, **factors)[0] for e in edits]


class _Plain:
    """What Lightning hands out inside a Trainer: the optimizer, and its step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.step = optimizer, optimizer.step


def compare(shape: str, base: str, options: argparse.Namespace) -> None:
    """Check one shape, and time both in turn."""
    bench = Bench(shape, base, options.dtype)
    edits = read_edits("atlas-records", limit=options.edits)
    few = edits[: options.plain_edits]
    found, expected = bench.ours(edits), bench.plain(few)
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=False))
    if options.dtype == "float32" and not difference <= TOLERANCE:
        raise AssertionError(f"{shape}: not the same targets ({difference:.1e}), so nothing to time")
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(options.repeat):
        for way, some in (("ours", edits), ("plain", few)):
            start = time.perf_counter()
            getattr(bench, way)(some)
            rates[way].append(len(some) / (time.perf_counter() - start))
    medians = {way: statistics.median(values) for way, values in rates.items()}
    parts = [f"{way} {medians[way]:.2f} edits/s ({min(v):.2f} to {max(v):.2f})" for way, v in rates.items()]
    ratio = medians["ours"] / medians["plain"]
    sys.stdout.write(f"{shape}: {', '.join(parts)}, ratio {ratio:.1f}; targets differ by {difference:.1e}\n")
    sys.stdout.flush()


def main() -> None:
    """Compare on every shape asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(LAYER), default=list(LAYER))
    parser.add_argument("--edits", type=int, default=64, help="edits optimised together")
    parser.add_argument("--plain_edits", type=int, default=4, help="edits of the plain twin")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    transformers.logging.disable_progress_bar()
    sys.stdout.write(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {SETTINGS['steps']} steps, {len(CONTEXTS)} contexts, median of {options.repeat}\n"
    )
    with tempfile.TemporaryDirectory() as base:
        for shape in options.shapes:
            compare(shape, base, options)


if __name__ == "__main__":
    main()

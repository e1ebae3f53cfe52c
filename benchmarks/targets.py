"""Target vectors of many edits: ours compared with a plain implementation, one edit at a time through the whole model.

    python benchmarks/targets.py [--shapes atlas gptj gpt2] [--edits 200] [--plain_edits 4] [--repeat 5]
        [--dtype bfloat16] [--model FOLDER --layer L --records FILE]

Same edits, same contexts, same number of steps (all of them: no edit stops early), and the same targets, which is
checked first. The plain implementation (benchmarks/plain.py) runs all rows of an edit in one pass, as other editors do;
its time per edit does not depend on the number of edits, so it gets only a few. Shapes: atlas (the shipped model), gptj
(8 layers of 512) and gpt2 (12 of 768) with random weights and a vocabulary of 5,000; with --model instead of these the
model in FOLDER, on the edits of FILE. With --dtype bfloat16 ours runs in
bfloat16, and is compared with the plain implementation in float32 and in bfloat16; the difference of the targets is
then the effect of the precision.

The floor is the time of the multiplications with weights that no implementation can avoid (see :func:`floor`), at the
rate of a large matrix product measured in the same run.
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
from typing import Any

import torch
import transformers
from plain import plain_target

from pmet_lightning import TargetOptimizer
from pmet_lightning.data.edit_rows import target_rows
from pmet_lightning.data.readers import read_edits
from pmet_lightning.data.records import Edit
from pmet_lightning.model.projections import Sites, in_features
from pmet_lightning.utils.resources import locate

SHAPES: dict[str, tuple[type[Any], dict[str, int]]] = {
    "gptj": (transformers.GPTJConfig, {"n_embd": 512, "n_layer": 8, "n_head": 8, "rotary_dim": 64}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 768, "n_layer": 12, "n_head": 12}),
}
LAYER = {"atlas": 2, "gptj": 3, "gpt2": 5}
PARALLEL = {"atlas", "gptj"}  # the FFN does not receive the output of its layer's attention
MATRIX = 2048  # rows of the matrix product that measures the machine
CONTEXTS = ["The clock was closed for a week. {}", "Because it was late, the boat stayed. {}", "I like it. {}"]
SETTINGS = {"steps": 10, "lr": 0.1, "clamp": 3.0}
# No rule may stop an edit early, so that both sides do equal work.
NO_STOP = {"loss_tolerance": 0.0, "stop_at_argmax": False}
TOLERANCE = 1e-4


def model_folder(shape: str, base: str) -> str:
    """A folder with a model of the given shape, which may be a folder itself."""
    if shape == "atlas":
        return locate("atlas")
    if shape not in SHAPES:
        return shape
    tokenizer = transformers.AutoTokenizer.from_pretrained(locate("atlas"))
    kind, sizes = SHAPES[shape]
    config = kind(vocab_size=5000, n_positions=128, bos_token_id=0, eos_token_id=0, **sizes)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(f"{base}/{shape}")
    tokenizer.save_pretrained(f"{base}/{shape}")
    return f"{base}/{shape}"


class Bench:
    """One model, and both ways to find targets on it."""

    def __init__(self, shape: str, layer: int, base: str, dtype: str) -> None:
        self.module = TargetOptimizer(
            model_folder(shape, base),
            layers=[layer],
            steps=SETTINGS["steps"],
            clamp=SETTINGS["clamp"],
            kl_factor=0.0625,
            norm_factor=0.1,
            target_value="stored",
            contexts=CONTEXTS,
            dtype=dtype,
            **NO_STOP,
            optimizer=lambda params: torch.optim.Adam(params, lr=SETTINGS["lr"]),
        )
        self.module.setup("fit")
        self.module.configure_model()
        self.module.contexts = CONTEXTS
        # As transformers loads it, with none of our changes.
        self.theirs = transformers.AutoModelForCausalLM.from_pretrained(
            self.module.model_name, dtype=getattr(torch, dtype)
        ).requires_grad_(False)
        optimizer = self.module.configure_optimizers()
        self.module.optimizers = lambda: InTrainer(optimizer)  # type: ignore[method-assign]

    def ours(self, edits: list[Edit]) -> list[torch.Tensor]:
        """Targets of all edits, optimized together."""
        targets = self.module.find_targets(edits)
        check_steps([target.record["steps"] for target in targets])
        return [target.values["ffn", self.module.target_layer] for target in targets]

    def plain(self, edits: list[Edit]) -> list[torch.Tensor]:
        """Targets by the plain implementation, one edit after the other."""
        sites = Sites.of(self.theirs, self.module.sites.architecture)
        layer = self.module.target_layer
        modules = sites.module("attn", layer), sites.module("ffn", layer)
        factors = {"nll": 1.0, "kl": 0.0625, "norm": 0.1}
        tokenizer = self.module.tokenizer
        options = {**SETTINGS, **NO_STOP, **factors}
        found = [plain_target(self.theirs, tokenizer, *modules, edit, CONTEXTS, **options) for edit in edits]
        check_steps([steps for _, steps in found])
        return [value for value, _ in found]


def check_steps(taken: list[int]) -> None:
    """Check that both sides do equal work: no edit has stopped early."""
    if set(taken) != {SETTINGS["steps"]}:
        raise AssertionError("an edit has stopped early, so its time says nothing")


def floor(bench: Bench, edits: list[Edit], parallel: bool) -> float:
    """Floating-point operations per edit that cannot be avoided: products with weights, in all steps.

    Tokens before the subject's last one never change, nor does the attention of layer L. In the layer above, only
    the subject's query, key and value do, and in a parallel block only its FFN. The last layer needs keys and values
    of all tokens, everything else where logits are read. A gradient costs what the value costs; the last step needs
    none. Products between tokens are not counted.
    """
    module = bench.module
    ffn = module.sites.module("ffn", module.target_layer)
    d, f = module.width, in_features(ffn)
    head = int(module.model.get_output_embeddings().weight.shape[0])
    middle = module.depth - module.target_layer - 3
    products = 0
    for edit in edits:
        for row in target_rows(edit, CONTEXTS, module.encoder):
            tail, labels = len(row.ids) - row.subject, max(1, len(row.labels))
            products += 0 if parallel else 2 * d * f
            products += 3 * d * d + tail * d * d + 2 * d * f * (1 if parallel else tail)
            products += middle * tail * (4 * d * d + 2 * d * f)
            products += 2 * tail * d * d + labels * (2 * d * d + 2 * d * f + d * head)
    return 2 * products * (2 * SETTINGS["steps"] - 1) / len(edits)


def matrix_rate(dtype: str, repeat: int) -> float:
    """Operations per second of a large matrix product."""
    a, b = (torch.randn(MATRIX, MATRIX, dtype=getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * MATRIX**3 / statistics.median(times[1:])


class InTrainer:
    """Stands in for the optimizer that Lightning returns inside a Trainer: with its step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.step = optimizer, optimizer.step


def compare(shape: str, base: str, options: argparse.Namespace) -> None:
    """Check one shape, and time both alternately."""
    layer = LAYER.get(shape, options.layer)
    bench = Bench(shape, layer, base, options.dtype)
    exact = bench if options.dtype == "float32" else Bench(shape, layer, base, "float32")
    edits = read_edits(options.records, limit=options.edits)
    few = edits[: options.plain_edits]
    found, expected = bench.ours(edits), exact.plain(few)
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=False))
    if options.dtype == "float32" and not difference <= TOLERANCE:
        raise AssertionError(f"{shape}: not the same targets ({difference:.1e}), so nothing to time")
    ways = {"ours": (bench.ours, edits), "plain": (exact.plain, few)}
    if exact is not bench:
        ways["plain in bfloat16"] = bench.plain, few
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.repeat):
        for way, (find, some) in ways.items():
            start = time.perf_counter()
            find(some)
            rates[way].append(len(some) / (time.perf_counter() - start))
    medians = {way: statistics.median(values) for way, values in rates.items()}
    for way, values in rates.items():
        ratio = "" if way == "ours" else f", ratio {medians['ours'] / medians[way]:.1f}"
        sys.stdout.write(f"{shape}: {way} {medians[way]:.2f} edits/s ({min(values):.2f} to {max(values):.2f}){ratio}\n")
    rate, needed = matrix_rate(options.dtype, options.repeat), floor(bench, edits, shape in PARALLEL)
    share = needed * medians["ours"] / rate
    sys.stdout.write(
        f"{shape}: targets differ by {difference:.1e}; floor {needed / 1e9:.2f} GFLOP an edit, at "
        f"{rate / 1e9:.0f} GFLOP/s of a matrix product {rate / needed:.1f} edits/s, of which ours reaches {share:.0%}\n"
    )
    sys.stdout.flush()


def main() -> None:
    """Compare on every selected shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(LAYER), default=list(LAYER))
    parser.add_argument("--edits", type=int, default=200, help="edits optimized together")
    parser.add_argument("--plain_edits", type=int, default=4, help="edits for the plain implementation")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--model", help="folder of a model, instead of the shapes")
    parser.add_argument("--layer", type=int, help="its layer L")
    parser.add_argument("--records", default="atlas-records", help="file of records to edit")
    options = parser.parse_args()
    if options.model and options.layer is None:
        parser.error("--model needs --layer")
    logging.disable(logging.INFO)
    transformers.logging.disable_progress_bar()
    sys.stdout.write(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {SETTINGS['steps']} steps, {len(CONTEXTS)} contexts, median of {options.repeat}\n"
    )
    with tempfile.TemporaryDirectory() as base:
        for shape in [options.model] if options.model else options.shapes:
            compare(shape, base, options)


if __name__ == "__main__":
    main()

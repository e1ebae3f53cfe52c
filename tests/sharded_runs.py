"""Fits of tiny models, whole or sharded; each process of a process group runs this file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.distributed.tensor import DTensor

from pmet_lightning.cli.dispatch import main
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.model.projections import add_to_weight, in_features
from pmet_lightning.write.edited_weights import EditedWeights
from pmet_lightning.write.keys import KeyRows, measure_values

FAMILIES = ("gpt2", "gptj")  # a sequential and a parallel block
TARGETS = {"gpt2": "successive", "gptj": "spread"}  # before and between writes


class Watch(L.Callback):
    """Sees that no weight stays whole, and stores the fingerprint of the edited model."""

    def check(self, module: Any) -> None:
        """Every process has its part of every weight only."""
        if module.device_mesh is not None:
            count = module.device_mesh.size()
            for name, parameter in module.model.named_parameters():
                assert isinstance(parameter, DTensor), name
                rows = -(-parameter.shape[0] // count)
                assert len(parameter.to_local()) <= rows, name

    def on_fit_start(self, trainer, pl_module):
        """What cannot be written leaves every row as it was, whichever process finds out."""
        with pytest.raises(FloatingPointError):
            self.write_nan(pl_module)
        assert fingerprint(pl_module.model) == pl_module.base_fingerprint

    def write_nan(self, module: Any) -> None:
        """Write twice: something finite, and something with a NaN in the last row."""
        projection = module.sites.module("ffn", 1)
        delta = torch.ones(module.width, in_features(projection), dtype=torch.float64)
        with EditedWeights(("ffn",)).transaction([projection]):
            written = add_to_weight(projection, delta)
            assert written.kept == pytest.approx(1)
            assert (written.changed, written.rounding) == (1, pytest.approx(0, abs=1e-12))
            assert fingerprint(module.model) != module.base_fingerprint
            delta[-1, -1] = torch.nan
            add_to_weight(projection, delta)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        """After an evaluation."""
        self.check(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        """After a backward pass."""
        self.check(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """After a pass that ends inside a layer."""
        over = KeyRows.of(batch.edits, [], pl_module.encoder, 100, pl_module.device)
        measure_values(pl_module.model, pl_module.sites, [("attn", 1)], over)
        self.check(pl_module)
        found = fingerprint(pl_module.model)
        if trainer.is_global_zero:
            (trainer.run_dir / "edited.txt").write_text(found)


def fit(folder: Path, base: Path, family: str, processes: int, config: str = "pmet.yaml") -> None:
    """A run in ``folder`` of the model, records and corpus in ``base``; another configuration says the strategy."""
    strategy = ["--trainer.strategy", "auto"] if config == "pmet.yaml" else []
    if processes > 1 and config == "pmet.yaml":
        strategy = ["--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy",
                    "--trainer.strategy.data_parallel_size", str(processes),
                    "--trainer.strategy.tensor_parallel_size", "1"]  # fmt: skip
    main([
        "fit", "--config", config, "--trainer.run_dir", str(folder), "--trainer.accelerator", "cpu",
        "--trainer.devices", str(processes), *strategy, "--trainer.enable_progress_bar", "false",
        "--trainer.callbacks+", "tests.sharded_runs.Watch", "--model.model_name", str(base / family),
        "--model.layers", "[1, 2]", "--model.dtype", "float64", "--model.attn_implementation", "eager",
        "--model.steps", "5", "--model.micro_batch", "3", "--model.targets_folder", str(folder / "targets"),
        "--data.path", str(base / "records.json"), "--data.edit_batch", "4", "--data.evaluation_batch", "2",
        "--moments.corpus", str(base / "corpus.txt"), "--moments.folder", str(folder / "moments"),
        "--spread.targets", TARGETS[family], "--spread.lam", "2", "--spread.preserve_prompts", "0.5",
        "--drift.text", str(base / "corpus.txt"), "--drift.rows", "4",
    ])  # fmt: skip


if __name__ == "__main__":
    here, inputs, count = sys.argv[1:]
    # One says its strategy in options, the other in the configuration that has it as a comment.
    for name, config_path in (("gptj", "pmet.yaml"), ("gpt2", str(Path(inputs) / "multi-gpu.yaml"))):
        fit(Path(here) / name, Path(inputs), name, int(count), config_path)

"""Fits of a tiny model in every shape of split; each process of a process group runs this file."""

from __future__ import annotations

import sys
from pathlib import Path

from pmet_lightning.cli import main

# Edits, and edits of an edit batch: 7 edits on 2 or 3 processes are uneven, one edit leaves a process without any.
SHAPES = {"whole": (7, None), "batches": (7, 3), "one": (1, None), "both": (5, None)}
EXTRA = {"both": ["--spread.write", "attn+ffn", "--model.micro_batch", "2"]}


def fit_all(folder: Path, model: str, records: Path, corpus: Path, processes: int) -> None:
    """A run in ``folder`` for each shape."""
    for name, (limit, edit_batch) in SHAPES.items():
        main([
            "fit", "--config", "pmet.yaml", "--trainer.run_dir", str(folder / name), "--trainer.accelerator", "cpu",
            "--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto",
            "--trainer.enable_progress_bar", "false", "--model.model_name", model, "--model.layers", "[1, 2]",
            "--model.dtype", "float64", "--model.attn_implementation", "eager", "--model.steps", "5",
            "--data.path", str(records), "--data.limit", str(limit), "--data.edit_batch", str(edit_batch or "null"),
            "--data.evaluation_batch", "2", "--moments.corpus", str(corpus), "--moments.folder",
            str(folder / "moments"), "--spread.lam", "2", "--drift.text", str(corpus), "--drift.rows", "4",
            *EXTRA.get(name, []),
        ])  # fmt: skip


if __name__ == "__main__":
    here, name, records_path, corpus_path, count = sys.argv[1:]
    fit_all(Path(here), name, Path(records_path), Path(corpus_path), int(count))

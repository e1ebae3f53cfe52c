"""Fits of a tiny model in every shape of split; each process of a process group runs this file."""

from __future__ import annotations

import atexit
import os
import sys
from itertools import count
from pathlib import Path

import torch

from pmet_lightning.cli.dispatch import main
from pmet_lightning.moments import second_moments as stats
from pmet_lightning.utils.distributed import sums_are_less
from pmet_lightning.write import weight_spread as spread
from pmet_lightning.write.keys import measure_keys

# Edits, and edits of an edit batch: 7 edits on 2 or 3 processes are uneven, one edit leaves a process without any.
# In "sums" K Kᵀ and E Kᵀ travel, as if edits were more than key dimensions.
SHAPES = {
    "whole": (7, None), "batches": (7, 3), "one": (1, None), "both": (5, None), "past": (7, 4), "sums": (7, 4),
    "successive": (7, 4),
}  # fmt: skip
EXTRA = {
    "both": ["--spread.write", "attn+ffn", "--model.micro_batch", "2", "--spread.preserve_prompts", "0.5"],
    "past": ["--spread.protect_past", "true", "--spread.preserve_prompts", "0.5"],
    "successive": ["--spread.targets", "successive"],
    "sums": ["--spread.protect_past", "false", "--spread.preserve_prompts", "0.5"],
}


def fit(folder: Path, model: str, records: Path, corpus: Path, processes: int, *extra: str) -> None:
    """One run."""
    main([
        "fit", "--config", "pmet.yaml", "--trainer.run_dir", str(folder), "--trainer.accelerator", "cpu",
        "--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto",
        "--trainer.enable_progress_bar", "false", "--model.model_name", model, "--model.layers", "[1, 2]",
        "--model.dtype", "float64", "--model.attn_implementation", "eager", "--model.steps", "5",
        "--data.path", str(records), "--data.evaluation_batch", "2", "--moments.corpus", str(corpus),
        "--moments.folder", str(folder.parent / "moments"), "--spread.lam", "2", "--drift.text", str(corpus),
        "--drift.rows", "4", *extra,
    ])  # fmt: skip


def fit_all(folder: Path, model: str, records: Path, corpus: Path, processes: int) -> None:
    """A run in ``folder`` for each shape."""
    for name, (limit, edit_batch) in SHAPES.items():
        travelled = count()
        spread.sums_are_less = sums_are_less if name != "sums" else lambda *_, times=travelled: bool(next(times) + 1)
        fit(
            folder / name, model, records, corpus, processes, "--data.limit", str(limit), "--data.edit_batch",
            str(edit_batch or "null"), "--model.targets_folder", str(folder / f"targets-{name}"), *EXTRA.get(name, []),
        )  # fmt: skip
        assert (next(travelled) > 0) == (name == "sums" and processes > 1)
    for limit in ("3", "6"):  # a run that goes on, whose keys no file has
        also = ("--data.limit", limit, "--trainer.resume", "true")
        fit(folder / "resumed", model, records, corpus, processes, *also)


def fit_until_one_dies(rank: str, folder: Path, model: str, records: Path, corpus: Path) -> None:
    """Two processes, of which one is gone in the keys of the second edit batch's first write."""
    seen = []

    def dying(*arguments):
        seen.append(1)
        if len(seen) == 3 and os.environ.get("LOCAL_RANK", "0") == rank:
            os._exit(9)
        return measure_keys(*arguments)

    spread.measure_keys = dying  # type: ignore[assignment]
    fit(folder, model, records, corpus, 2, "--data.edit_batch", "3", "--trainer.resume", "true")


def collect(folder: Path, model: str, corpus: Path, processes: int) -> None:
    """Second moments, where the last process has room for those of one layer at a time only."""
    if os.environ.get("LOCAL_RANK", "0") == str(processes - 1):
        stats.free_memory = lambda _: (12 + 8) * 128 * 128
    main([
        "stats", "--config", "pmet.yaml", "--trainer.run_dir", str(folder), "--trainer.accelerator", "cpu",
        "--trainer.devices", str(processes), "--trainer.strategy", "ddp", "--trainer.enable_progress_bar", "false",
        "--model.model_name", model, "--model.layers", "[1, 2]", "--model.dtype", "float64",
        "--model.attn_implementation", "eager", "--moments.corpus", str(corpus),
        "--moments.folder", str(folder / "moments"),
    ])  # fmt: skip


def check_group_is_left() -> None:
    """A group that is still there while Python ends may abort the process; not every time, so that it is looked for."""
    if torch.distributed.is_initialized():
        sys.stderr.write("the process group was not left\n")
        os._exit(7)


if __name__ == "__main__":
    atexit.register(check_group_is_left)  # the first to register is called last
    what, here, name, records_path, corpus_path = sys.argv[1:]
    paths = Path(here), name, Path(records_path), Path(corpus_path)
    if what == "stats":
        collect(paths[0], name, paths[3], int(os.environ["WORLD_SIZE"]))
    elif what == "nodes":
        nodes = ["--trainer.devices", "1", "--trainer.strategy", "ddp", "--trainer.num_nodes", "2"]
        fit(*paths, 2, "--data.edit_batch", "3", *nodes)
    elif what.startswith("dies"):
        fit_until_one_dies(what.removeprefix("dies"), *paths)
    else:
        fit_all(*paths, int(what))

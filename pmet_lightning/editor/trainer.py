"""The trainer of one call of an :class:`~pmet_lightning.editor.editor.Editor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from pmet_lightning.run.trainer import EDIT_RUN, EditTrainer, device_options
from pmet_lightning.utils.progress import EditProgressBar


def make_trainer(
    device: torch.device,
    callbacks: Sequence[Callback],
    run_dir: str | Path | None = None,
    *,
    evaluate: bool,
    progress: bool,
) -> L.Trainer:
    """Make Lightning's trainer, for the model's device and this process only.

    Args:
        device: Where the model is.
        callbacks: Its callbacks.
        run_dir: A folder for the files of a run; ``None`` stores nothing.
        evaluate: Whether the model is evaluated before and after.
        progress: Whether progress bars are shown.
    """
    options: dict[str, Any] = {
        **device_options(device),
        "enable_progress_bar": progress,
        **({} if evaluate else {"num_sanity_val_steps": 0, "limit_val_batches": 0}),
    }
    if run_dir is not None:
        return EditTrainer(str(run_dir), callbacks=list(callbacks), **options)
    bars = [EditProgressBar()] if progress else []
    return L.Trainer(**{**EDIT_RUN, **options, "logger": False, "callbacks": [*callbacks, *bars]})

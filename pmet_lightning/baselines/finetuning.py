"""A baseline: plain fine-tuning of one layer, as a LightningModule.

The FFN output projection of one layer learns the targets by gradient descent on rows that the target optimization uses
too. Nothing but that matrix is changed, so the result can be compared with what an editor writes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from pmet_lightning.data.datamodule import EditBatch
from pmet_lightning.data.edit_rows import BARE
from pmet_lightning.data.records import Edit
from pmet_lightning.data.token_rows import TokenRow, pad_rows
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.model.forward import label_logits
from pmet_lightning.model.projections import keep_in_float32
from pmet_lightning.model.scoring import target_scores
from pmet_lightning.utils.metric_names import FINETUNING
from pmet_lightning.utils.types import NonNegativeFloat, PositiveInt


class FineTuning(EditableModel):
    """Trains the FFN output projection of the last of ``layers`` on the edits' prompts and targets.

    An edit batch is trained as a whole.

    Args:
        model_name: A folder made by save_pretrained, a hub name, or the shipped 'atlas'.
        epochs: Maximum number of passes over the edits.
        batch: Edits in a gradient step.
        optimizer: Any optimizer.
        loss_tolerance: Training stops when the mean negative log-likelihood of an epoch is below this.
        skip_below: A gradient step is left out when its loss is below this (LocFT: 0.01).
        end_of_text: Whether the target ends with the tokenizer's end-of-text token, which is learned too (LocFT).
        max_change: Limit of the norm of the change, relative to that of the matrix; null sets no limit.
        seed: Seed of the order of the edits.
        kwargs: Everything that :class:`~pmet_lightning.evaluation.editable.EditableModel` takes.
    """

    def __init__(
        self,
        model_name: str,
        epochs: PositiveInt = 30,
        batch: PositiveInt = 32,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        loss_tolerance: NonNegativeFloat = 0.05,
        skip_below: NonNegativeFloat = 0.0,
        end_of_text: bool = False,
        max_change: NonNegativeFloat | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, **kwargs)
        self.automatic_optimization = False
        self.epochs, self.batch, self.loss_tolerance = epochs, batch, loss_tolerance
        self.skip_below, self.end_of_text = skip_below, end_of_text
        self.optimizer_callable, self.max_change, self.seed = optimizer, max_change, seed

    @property
    def projection(self) -> nn.Module:
        """The projection that is trained."""
        return self.sites.module("ffn", self.layers[-1])

    def configure_model(self) -> None:
        """Load the language model, once; the trained matrix is kept in float32."""
        if self.lm is None:
            if self.device_mesh is not None:
                raise ValueError("finetune trains a weight, which must not be sharded: expected one process or ddp")
            super().configure_model()
            keep_in_float32(self.projection)
            self.projection.weight.requires_grad_(True)  # type: ignore[operator,union-attr]

    def configure_optimizers(self) -> Any:
        """The optimizer of the one matrix."""
        return self.optimizer_callable([self.projection.weight])  # type: ignore[list-item]

    def training_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Train on all edits until their loss is low enough, or for ``epochs`` passes."""
        rows = [self._row(edit) for edit in batch.edits]
        weight = self.projection.weight
        assert isinstance(weight, Tensor)
        clean = weight.detach().clone()
        generator = torch.Generator().manual_seed(self.seed)
        with torch.enable_grad():
            for _ in range(self.epochs):
                order = torch.randperm(len(rows), generator=generator).split(self.batch)
                nll = torch.cat([self._step([rows[i] for i in part.tolist()], weight, clean) for part in order])
                mean = float(nll.mean())
                means = {"loss": mean, "p": float((-nll).exp().mean())}
                self.curves.append({"step": float(self.inner_step), **means})
                self.log_step(FINETUNING, means)
                if mean < self.loss_tolerance:
                    break

    def _row(self, edit: Edit) -> TokenRow:
        """The edit's prompt and target.

        Raises:
            ValueError: If the end of text is to be learned, and the tokenizer has no token for it.
        """
        row = self.encoder.encode(edit.prompt, edit.subject, context=BARE, target=edit.target)
        if not self.end_of_text:
            return row
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError("--model.end_of_text true: the tokenizer has no end-of-text token; set it to false")
        return replace(row, ids=[*row.ids, row.labels[-1]], labels=(*row.labels, int(end)))

    def _step(self, rows: list[TokenRow], weight: Tensor, clean: Tensor) -> Tensor:
        """Take one gradient step; returns the negative log-likelihood of each edit before it."""
        padded = pad_rows(rows, self.encoder.pad_id, self.padding_side).to(self.device)
        nll = target_scores(label_logits(self.model, padded), padded.label_ids).nll
        if float(nll.detach().mean()) < self.skip_below:
            return nll.detach()
        optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
        (weight.grad,) = torch.autograd.grad(nll.mean(), [weight])
        optimizer.step()
        if self.max_change is not None:
            with torch.no_grad():
                change = weight - clean
                limit = self.max_change * clean.norm()
                weight.copy_(clean + change * (limit / change.norm().clamp_min(1e-30)).clamp(max=1.0))
        return nll.detach()

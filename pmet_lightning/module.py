"""Step 1 of METHOD.md as a LightningModule: the residual deltas are its trainable parameters.

One training batch is one micro-batch of edits; inside it the deltas take up to ``steps`` Adam steps
(manual optimisation). Edits that stop leave the forward pass, and their deltas no longer move.
Legend: B = edits of the micro-batch, A = those still active, F = model width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from pmet_lightning.architectures import SiteName
from pmet_lightning.contexts import check_contexts, sample_contexts
from pmet_lightning.data import EditBatch
from pmet_lightning.editable import EditableModel
from pmet_lightning.edits import Edit
from pmet_lightning.edits.requests import target_rows
from pmet_lightning.language_model import fingerprint
from pmet_lightning.optimisation import LossWeights, TargetLoop
from pmet_lightning.targets import Target, TargetStore

log = logging.getLogger(__name__)

Optimised = Literal["attn+ffn", "ffn", "hidden"]
TargetValue = Literal["stored", "realised"]
_SITES: dict[Optimised, tuple[SiteName, ...]] = {
    "attn+ffn": ("attn", "ffn"),
    "ffn": ("ffn",),
    "hidden": ("hidden",),
}


class TargetOptimizer(EditableModel):
    """Finds target vectors for edits of a frozen causal language model.

    The targets live in the last of ``layers``.

    Args:
        model_name: A folder made by save_pretrained, a hub name, or the shipped 'atlas'.
        optimise: What gets a delta: attention and FFN output (PMET), FFN output only, or the layer's output
            (MEMIT).
        target_value: v* as 'realised' by the model while the deltas are in place, or as 'stored' by the reference
            (clean output plus delta); they differ where one delta reaches the other, in sequential blocks only, and
            there the realised one was better (docs/results.md).
        steps: Most iterations for one edit; the last one makes no update.
        optimizer: Adam and its learning rate; must be element-wise, or edits would disturb each other.
        clamp: Radius of the ball of each delta, in norms of its clean output.
        nll_factor: Weight of the target's negative log-likelihood.
        kl_factor: Weight of the divergence at "{subject} is a".
        norm_factor: Weight of the norm term.
        loss_tolerance: An edit whose loss is below this stops.
        stop_at_argmax: Whether an edit also stops as soon as every target token is the argmax and the subject's
            meaning has not drifted (PMET; MEMIT never does). Without it targets become more certain, and take longer.
        contexts: Templates with one {} each; null samples them from the model.
        context_count: How many contexts are sampled.
        context_length: New tokens of each sampled context.
        seed: Seed of the sampled contexts.
        targets_folder: Folder in which finished targets are kept and found again; null keeps none.
        suffix_only: Whether what stands before the subjects and below layer L is computed once; the whole model at
            every step gives the same, and is there for comparison.
        kwargs: Everything that :class:`~pmet_lightning.editable.EditableModel` takes.
    """

    def __init__(
        self,
        model_name: str,
        optimise: Optimised = "attn+ffn",
        target_value: TargetValue = "realised",
        steps: PositiveInt = 30,  # type: ignore[valid-type]
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=0.2),
        clamp: PositiveFloat = 0.75,  # type: ignore[valid-type]
        nll_factor: NonNegativeFloat = 1.0,  # type: ignore[valid-type]
        kl_factor: NonNegativeFloat = 1.0,  # type: ignore[valid-type]
        norm_factor: NonNegativeFloat = 0.5,  # type: ignore[valid-type]
        loss_tolerance: NonNegativeFloat = 0.05,  # type: ignore[valid-type]
        stop_at_argmax: bool = True,
        contexts: list[str] | None = None,
        context_count: NonNegativeInt = 5,  # type: ignore[valid-type]
        context_length: PositiveInt = 10,  # type: ignore[valid-type]
        seed: NonNegativeInt = 0,  # type: ignore[valid-type]
        targets_folder: str | None = None,
        suffix_only: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, **kwargs)
        self.automatic_optimization = False
        self.sites_optimised = _SITES[optimise]
        self.target_value = target_value
        self.steps, self.clamp, self.loss_tolerance = steps, clamp, loss_tolerance
        self.argmax_rule = stop_at_argmax and optimise != "hidden"
        self.weights = LossWeights(nll_factor, kl_factor, norm_factor)
        self.optimizer_callable = optimizer
        self.given_contexts = None if contexts is None else check_contexts(contexts)
        self.context_count, self.context_length, self.seed = context_count, context_length, seed
        self.targets_folder, self.suffix_only = targets_folder, suffix_only

        # Their width is not known before the model is: configure_model gives them their shape.
        self.deltas = nn.ParameterDict({site: nn.Parameter(torch.zeros(0)) for site in self.sites_optimised})
        self.contexts: list[str] = []
        self._store: TargetStore | None = None
        self._store_batch = -1

    def setup(self, stage: str) -> None:
        """Check the layers and the family by the configuration alone, before any weight is read."""
        super().setup(stage)
        if self.target_layer == self.depth - 1:
            log.warning(
                "layer %d is the model's last: a target there changes only what follows a subject at once, and "
                "nothing in prompts that go on; leave the upper layers out of --model.layers", self.target_layer,
            )  # fmt: skip

    def configure_model(self) -> None:
        """Load the language model, once, and give the deltas its width."""
        if self.lm is None:
            super().configure_model()
            for delta in self.deltas.values():
                delta.data = torch.zeros(1, self.width, dtype=self.delta_dtype)

    @property
    def delta_dtype(self) -> torch.dtype:
        """Deltas, losses and Adam's state: float32, or float64 for a float64 model."""
        weight = next(self.model.parameters())
        return torch.promote_types(weight.dtype, torch.float32)

    @property
    def target_layer(self) -> int:
        """L, the last edited layer."""
        return self.layers[-1]

    # ---- the targets -----------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """One element-wise optimizer over all deltas."""
        return self.optimizer_callable(self.deltas.parameters())

    def on_fit_start(self) -> None:
        """Fix the contexts of the run."""
        if self.given_contexts is not None:
            self.contexts = self.given_contexts
        elif not self.contexts:
            self.contexts = sample_contexts(
                self.model,
                self.tokenizer,
                count=self.context_count,
                length=self.context_length,
                seed=self.seed,
                device=self.device,
            )
        log.info("contexts: %s", self.contexts)

    def training_step(self, batch: EditBatch, batch_idx: int) -> dict[str, list[Target]]:
        """Optimise one micro-batch, or take its targets from the store.

        Returns:
            ``targets``: one for each edit, in order.
        """
        store = self._target_store(batch.edit_batch)
        found = [store.load(edit.identity()) if store else None for edit in batch.edits]
        missing = [edit for edit, target in zip(batch.edits, found, strict=True) if target is None]
        fresh = iter(self.optimise(missing) if missing else [])
        targets = []
        for edit, target in zip(batch.edits, found, strict=True):
            if target is None:
                target = next(fresh)
                if store:
                    store.save(edit.identity(), target)
            targets.append(target)
        return {"targets": targets}

    def optimise(self, edits: Sequence[Edit]) -> list[Target]:
        """Find the target vectors of some edits on the model as it is now.

        Raises:
            FloatingPointError: If a loss is not finite; the message names the edit.
        """
        rows = target_rows(edits, self.contexts, self.encoder, self.padding_side).to(self.device)
        optimizer = self.optimizers()
        optimizer.optimizer.state.clear()  # type: ignore[union-attr]
        for delta in self.deltas.values():
            delta.data = torch.zeros(len(edits), self.width, dtype=self.delta_dtype, device=self.device)
        loop = TargetLoop(
            model=self.model,
            modules={site: self.sites.module(site, self.target_layer) for site in self.sites_optimised},
            deltas={site: self.deltas[site] for site in self.sites_optimised},
            rows=rows,
            layers=[self.sites.module("hidden", i) for i in range(self.target_layer + 1)] if self.suffix_only else None,
            rows_per_edit=len(self.contexts) + 2,
            weights=self.weights,
            loss_tolerance=self.loss_tolerance,
            argmax_rule=self.argmax_rule,
            names=[edit.origin or edit.question for edit in edits],
        )
        with torch.enable_grad():
            for step in range(self.steps):
                self.log_step("targets", loop.iterate(last=step == self.steps - 1))
                if not loop.active.any():
                    break
                loop.update(optimizer.step, self.clamp)  # type: ignore[union-attr]
        return loop.results(realised=self.target_value == "realised")

    def _target_store(self, edit_batch: int) -> TargetStore | None:
        """The store of the model as it is now; a later edit batch meets other weights."""
        if self.targets_folder is None:
            return None
        if self._store is None or self._store_batch != edit_batch:
            optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
            defaults = {name: value for name, value in optimizer.defaults.items() if name != "params"}
            self._store = TargetStore(
                self.targets_folder,
                {
                    "model": fingerprint(self.model),
                    "tokenizer": self.encoder.fingerprint(),
                    "contexts": self.contexts,
                    "layer": self.target_layer,
                    "sites": self.sites_optimised,
                    "target_value": self.target_value,
                    "steps": self.steps,
                    "clamp": self.clamp,
                    "weights": vars(self.weights),
                    "loss_tolerance": self.loss_tolerance,
                    "argmax_rule": self.argmax_rule,
                    "optimizer": [type(optimizer).__name__, defaults],
                },
            )
            self._store_batch = edit_batch
        return self._store

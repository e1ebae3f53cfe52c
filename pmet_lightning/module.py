"""Step 1 of METHOD.md as a LightningModule: the residual deltas are its trainable parameters.

One training batch is one micro-batch of edits; inside it the deltas take up to ``steps`` Adam steps
(manual optimisation). Edits that stop leave the forward pass, and their deltas no longer move.
Legend: B = edits of the micro-batch, A = those still active, F = model width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torchmetrics.utilities import dim_zero_cat

from pmet_lightning.architectures import (
    Architecture,
    SiteName,
    Sites,
    advised_layers,
    architecture_of,
    depth_of,
    keep_in_float32,
)
from pmet_lightning.contexts import check_contexts, sample_contexts
from pmet_lightning.data import EditBatch
from pmet_lightning.edits import Edit
from pmet_lightning.edits.requests import target_rows
from pmet_lightning.language_model import (
    DtypeName,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
)
from pmet_lightning.metrics import EditScores, ProbeResult, score_probes
from pmet_lightning.optimisation import LossWeights, TargetLoop
from pmet_lightning.patch import apply_patch
from pmet_lightning.solve import written_sites
from pmet_lightning.targets import Target, TargetStore
from pmet_lightning.tokens import PaddingSide, PromptEncoder

log = logging.getLogger(__name__)

Optimised = Literal["attn+ffn", "ffn", "hidden"]
TargetValue = Literal["stored", "realised"]
_SITES: dict[Optimised, tuple[SiteName, ...]] = {
    "attn+ffn": ("attn", "ffn"),
    "ffn": ("ffn",),
    "hidden": ("hidden",),
}


class TargetOptimizer(L.LightningModule):
    """Finds target vectors for edits of a frozen causal language model.

    Args:
        model_name: A folder made by save_pretrained, a hub name, or the shipped 'atlas'.
        layers: Layers whose weights are edited; the last of them is where the targets live. 'auto' picks a range by
            the model's depth and says which.
        optimise: What gets a delta: attention and FFN output (PMET), FFN output only, or the layer's output
            (MEMIT).
        target_value: v* as 'stored' by the reference (clean output plus delta) or as 'realised' by the model
            while the delta is in place; they differ in sequential blocks only.
        steps: Most iterations for one edit; the last one makes no update.
        optimizer: Adam and its learning rate; must be element-wise, or edits would disturb each other.
        clamp: Radius of the ball of each delta, in norms of its clean output.
        nll_factor: Weight of the target's negative log-likelihood.
        kl_factor: Weight of the divergence at "{subject} is a".
        norm_factor: Weight of the norm term.
        loss_tolerance: An edit whose loss is below this stops.
        contexts: Templates with one {} each; null samples them from the model.
        context_count: How many contexts are sampled.
        context_length: New tokens of each sampled context.
        seed: Seed of the sampled contexts.
        dtype: Precision the model is loaded in; 'auto' takes the file's.
        attn_implementation: Attention kernel asked of transformers, such as eager or sdpa; null takes its
            default.
        architecture: Module paths of a family that is not known by itself.
        padding_side: Where rows are padded; changes nothing. (Left, with eager attention in float64, makes some
            families give NaN: their mask overflows.)
        tokens_per_batch: Most tokens in one forward pass of the key and evaluation passes.
        free_tokens: Most tokens of the free answers that are judged beside the teacher-forced ones; 0 asks for none.
        targets_folder: Folder in which finished targets are kept and found again; null keeps none.
        chat: Whether prompts are a user's messages in the tokenizer's chat template, and targets the beginning of
            the assistant's answer.
        keep_float32: Whether the output projections of the edited layers of a half-precision model are held in
            float32, so that no part of an edit is rounded away here (``export --dtype float32`` keeps it in a folder).
        patch: A patch.safetensors that is applied after loading.
    """

    def __init__(
        self,
        model_name: str,
        layers: list[NonNegativeInt] | Literal["auto"] = "auto",  # type: ignore[valid-type]
        optimise: Optimised = "attn+ffn",
        target_value: TargetValue = "stored",
        steps: PositiveInt = 30,  # type: ignore[valid-type]
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=0.2),
        clamp: PositiveFloat = 0.75,  # type: ignore[valid-type]
        nll_factor: NonNegativeFloat = 1.0,  # type: ignore[valid-type]
        kl_factor: NonNegativeFloat = 1.0,  # type: ignore[valid-type]
        norm_factor: NonNegativeFloat = 0.5,  # type: ignore[valid-type]
        loss_tolerance: NonNegativeFloat = 0.05,  # type: ignore[valid-type]
        contexts: list[str] | None = None,
        context_count: NonNegativeInt = 5,  # type: ignore[valid-type]
        context_length: PositiveInt = 10,  # type: ignore[valid-type]
        seed: NonNegativeInt = 0,  # type: ignore[valid-type]
        dtype: DtypeName = "auto",
        attn_implementation: str | None = None,
        architecture: Architecture | None = None,
        padding_side: PaddingSide = "right",
        tokens_per_batch: PositiveInt = 8192,  # type: ignore[valid-type]
        free_tokens: NonNegativeInt = 16,  # type: ignore[valid-type]
        targets_folder: str | None = None,
        chat: bool = False,
        keep_float32: bool = False,
        patch: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # the language model is no part of a checkpoint
        self.model_name = model_name
        self.layers_wanted: list[int] | None = None if layers == "auto" else sorted(map(int, layers))
        self.layers = self.layers_wanted or []  # final after setup
        self.sites_optimised = _SITES[optimise]
        self.target_value = target_value
        self.steps, self.clamp, self.loss_tolerance = steps, clamp, loss_tolerance
        self.weights = LossWeights(nll_factor, kl_factor, norm_factor)
        self.optimizer_callable = optimizer
        self.given_contexts = None if contexts is None else check_contexts(contexts)
        self.context_count, self.context_length, self.seed = context_count, context_length, seed
        self.dtype_name, self.attn_implementation = dtype, attn_implementation
        self.architecture_override = architecture
        self.padding_side: PaddingSide = padding_side
        self.tokens_per_batch = tokens_per_batch
        self.targets_folder, self.patch = targets_folder, patch
        self.free_tokens = free_tokens
        self.chat, self.keep_float32 = chat, keep_float32

        # Their width is not known before the model is: configure_model gives them their shape.
        self.deltas = nn.ParameterDict({site: nn.Parameter(torch.zeros(0)) for site in self.sites_optimised})
        self.contexts: list[str] = []
        self.lm: nn.Module | None = None
        self._encoder: PromptEncoder | None = None
        self.base_fingerprint = ""
        self.inner_step = 0
        self.scores = EditScores()
        self.results: dict[str, dict[str, float]] = {}
        self.record_rows: dict[str, torch.Tensor] = {}
        self.drift: dict[str, dict[str, float]] = {}
        self._architecture: Architecture | None = None
        self._store: TargetStore | None = None
        self._store_batch = -1

    # ---- the model -------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the layers and the family by the configuration alone, before any weight is read."""
        config = load_config(self.model_name)
        self._architecture = architecture_of(config, self.architecture_override)
        depth = depth_of(config)
        if self.layers_wanted is None:
            self.layers = advised_layers(depth)
            log.info("--model.layers auto: layers %s of %d, by depth alone", self.layers, depth)
        outside = [layer for layer in self.layers if layer >= depth]
        if outside or not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"--model.layers is {self.layers}, expected different layers from 0 to {depth - 1}: "
                f"{self.model_name!r} has {depth}"
            )
        if self.target_layer == depth - 1:
            log.warning(
                "layer %d is the model's last: a target there changes only what follows a subject at once, and "
                "nothing in prompts that go on; leave the upper layers out of --model.layers", self.target_layer,
            )  # fmt: skip
        if self._encoder is None:
            self._encoder = PromptEncoder.of(load_tokenizer(self.model_name), self.chat)

    def configure_model(self) -> None:
        """Load the language model, once."""
        if self.lm is not None:
            return
        assert self._architecture is not None, "setup runs before configure_model"
        self.lm = load_model(self.model_name, self.dtype_name, self.attn_implementation)
        self.base_fingerprint = fingerprint(self.lm)
        if self.keep_float32 and self.lm.dtype in (torch.bfloat16, torch.float16):
            for layer in self.layers:
                for site in written_sites("attn+ffn"):
                    keep_in_float32(self.sites.module(site, layer))
        if self.patch is not None:
            apply_patch(self.lm, Sites.of(self.lm, self._architecture), self.patch, self.base_fingerprint)
        for delta in self.deltas.values():
            delta.data = torch.zeros(1, self.width, dtype=self.delta_dtype)

    @property
    def model(self) -> nn.Module:
        """The loaded language model."""
        if self.lm is None:
            raise RuntimeError("the language model is not loaded; run this module in a Trainer")
        return self.lm

    @property
    def encoder(self) -> PromptEncoder:
        """What makes its token rows."""
        assert self._encoder is not None, "setup has not run"
        return self._encoder

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.encoder.tokenizer

    @property
    def sites(self) -> Sites:
        """Its modules at which vectors are recorded, added and written."""
        assert self._architecture is not None
        return Sites.of(self.model, self._architecture)

    @property
    def width(self) -> int:
        """F, the width of the residual stream."""
        return self.sites.width

    @property
    def delta_dtype(self) -> torch.dtype:
        """Deltas, losses and Adam's state: float32, or float64 for a float64 model."""
        weight = next(self.model.parameters())
        return torch.promote_types(weight.dtype, torch.float32)

    @property
    def target_layer(self) -> int:
        """L, the last edited layer."""
        return self.layers[-1]

    def train(self, mode: bool = True) -> TargetOptimizer:
        """Switch the module; the language model stays in eval mode."""
        super().train(mode)
        if self.lm is not None:
            self.lm.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The state without the language model, which is frozen and has files of its own."""
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith("lm.")}

    def transfer_batch_to_device(self, batch: EditBatch, device: torch.device, dataloader_idx: int) -> EditBatch:
        """A batch is text; its rows are made, and moved, where they are used."""
        return batch

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
            rows_per_edit=len(self.contexts) + 2,
            weights=self.weights,
            loss_tolerance=self.loss_tolerance,
            argmax_rule="hidden" not in self.sites_optimised,
            names=[edit.origin or edit.question for edit in edits],
        )
        with torch.enable_grad():
            for step in range(self.steps):
                self._log_step(loop.iterate(last=step == self.steps - 1))
                if not loop.active.any():
                    break
                loop.update(optimizer.step, self.clamp)  # type: ignore[union-attr]
        return loop.results(realised=self.target_value == "realised")

    def _log_step(self, means: dict[str, float]) -> None:
        """A point of each curve for every inner step, whatever Lightning's logging interval is."""
        for logger in self.loggers:
            logger.log_metrics({f"targets/{name}": value for name, value in means.items()}, self.inner_step)
        self.inner_step += 1

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
                    "optimizer": [type(optimizer).__name__, defaults],
                },
            )
            self._store_batch = edit_batch
        return self._store

    # ---- evaluation ------------------------------------------------------------------------------------

    def evaluate(self, edits: Sequence[Edit]) -> list[list[ProbeResult]]:
        """Ask the questions of some edits on the model as it is now."""
        probes = [edit.probes for edit in edits]
        return score_probes(self.model, self.encoder, probes, self.tokens_per_batch, self.device, self.free_tokens)

    def validation_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Score the edits' questions on the model as it is now."""
        self.scores.update(self.evaluate(batch.edits))

    def test_step(self, batch: EditBatch, batch_idx: int) -> None:
        """As :meth:`validation_step`."""
        self.scores.update(self.evaluate(batch.edits))

    def on_validation_epoch_end(self) -> None:
        """Close the scores; Lightning's check before the first edit is the evaluation 'before'."""
        self._close_scores("before" if self.trainer.sanity_checking else "after")

    def on_test_epoch_end(self) -> None:
        """Close the scores."""
        self._close_scores("test")

    def _close_scores(self, phase: str) -> None:
        table = {name: float(value) for name, value in self.scores.compute().items()}
        if len(self.scores.rows):
            self.record_rows[phase] = dim_zero_cat(self.scores.rows).cpu()
        self.scores.reset()
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.log_dict(table)
            return
        self.results[phase] = table
        for logger in self.loggers:
            logger.log_metrics({f"{phase}/{name}": value for name, value in table.items()}, self.inner_step)

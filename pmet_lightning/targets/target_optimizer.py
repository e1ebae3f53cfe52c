"""The target optimization (docs/method.md, 'Targets') as a LightningModule: the deltas are its trainable parameters.

One training batch is one edit batch. Some of its edits at a time take up to ``steps`` Adam steps (manual
optimization); as soon as some have stopped, others take their slots (continuous batching).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from pmet_lightning.data.datamodule import EditBatch
from pmet_lightning.data.edit_rows import target_rows
from pmet_lightning.data.records import Edit
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.model.architectures import ProjectionId, SiteName
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.model.partial_forward import PartialForward
from pmet_lightning.model.prefix_passes import has_plain_cache
from pmet_lightning.targets.active_batch import DeltaSlots
from pmet_lightning.targets.batch_size import ModelSize
from pmet_lightning.targets.construction import (
    Construction,
    delta_layers,
    early_layers,
    target_layers,
    written_layers,
)
from pmet_lightning.targets.contexts import ContextStore, check_contexts, sample_contexts
from pmet_lightning.targets.equal_keys import KeyGroups, companions
from pmet_lightning.targets.loop import Request, Rules, TargetLoop, choose_micro_batch
from pmet_lightning.targets.store import Target, TargetStore, join_targets
from pmet_lightning.targets.suffix_check import suffix_agrees
from pmet_lightning.utils.distributed import ProcessGroup
from pmet_lightning.utils.metric_names import LIVE
from pmet_lightning.utils.progress import counter, numbered
from pmet_lightning.utils.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

log = logging.getLogger(__name__)

# Steps between two synchronizations with the host, which make a device wait that otherwise runs ahead of the host.
SYNC_EVERY = {"cpu": 1}
_SYNC_EVERY_ELSEWHERE = 4

OptimizedSites = Literal["attn+ffn", "ffn", "hidden"]
TargetValue = Literal["stored", "realized"]
_SITES: dict[OptimizedSites, tuple[SiteName, ...]] = {
    "attn+ffn": ("attn", "ffn"),
    "ffn": ("ffn",),
    "hidden": ("hidden",),
}


class TargetOptimizer(EditableModel):
    """Finds target vectors for edits of a frozen causal language model.

    The targets live in the last of ``layers``, or as the construction of the write that follows wants it
    (:mod:`~pmet_lightning.targets.construction`).

    Args:
        model_name: A folder made by save_pretrained, a hub name, or the shipped 'atlas'.
        optimize: What gets a delta: attention and FFN output (PMET), FFN output only, or the layer's output
            (MEMIT).
        target_value: v* as 'realized' by the model while the deltas are in place, or as 'stored' by the reference
            (clean output plus delta); they differ where one delta reaches the other, in sequential blocks only, and
            there the realized one was better (docs/results.md).
        steps: Maximum number of iterations for one edit; the last one makes no update.
        optimizer: Adam and its learning rate; the delta of each edit is a parameter of its own.
        clamp: Radius of the ball of each delta, in norms of its clean output.
        nll_factor: Weight of the target's negative log-likelihood.
        kl_factor: Weight of the divergence at "{subject} is a".
        norm_factor: Weight of the norm term.
        loss_tolerance: An edit whose loss is below this stops.
        stop_at_argmax: Whether an edit also stops as soon as every target token is the argmax and the subject's
            meaning has not drifted (PMET; MEMIT never does). Without it targets become more certain, and take longer.
        attention_steps: After so many steps, or when it would stop, an edit goes on without the attention's delta, from
            the FFN's output as it is then: the target is one that the FFN can hold alone. Null keeps both deltas to the
            end (PMET).
        merge_equal_keys: Whether edits that have the same key, as facts about one subject may, share one target that
            serves all of them, those of earlier edit batches too; otherwise each finds its own, and the write takes
            their mean.
        contexts: Templates with one {} each; null samples them from the model.
        context_count: Number of contexts to sample.
        context_length: New tokens in each sampled context.
        seed: Seed of the sampled contexts.
        targets_folder: Folder in which sampled contexts and finished targets are kept, under a hash of all that they
            depend on, and found by later runs; null keeps none.
        micro_batch: Number of edits optimized together; affects only memory and time. 'auto' takes as many as fit into
            free memory and save time. An allocation that fails halves the number.
        suffix_only: Whether what precedes the subjects, or lies below layer L, is computed once; running the whole
            model at every step gives the same, and is there for comparison.
        compile_ffn: Whether torch.compile fuses the FFNs above layer L: less memory traffic at every step, for some
            seconds of compilation at the first.
        kwargs: Everything that :class:`~pmet_lightning.evaluation.editable.EditableModel` takes.
    """

    def __init__(
        self,
        model_name: str,
        optimize: OptimizedSites = "attn+ffn",
        target_value: TargetValue = "realized",
        steps: PositiveInt = 30,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=0.2),
        clamp: PositiveFloat = 0.75,
        nll_factor: NonNegativeFloat = 1.0,
        kl_factor: NonNegativeFloat = 1.0,
        norm_factor: NonNegativeFloat = 0.5,
        loss_tolerance: NonNegativeFloat = 0.05,
        stop_at_argmax: bool = True,
        attention_steps: PositiveInt | None = None,
        merge_equal_keys: bool = True,
        contexts: list[str] | None = None,
        context_count: NonNegativeInt = 5,
        context_length: PositiveInt = 10,
        seed: NonNegativeInt = 0,
        targets_folder: str | None = None,
        micro_batch: PositiveInt | Literal["auto"] = "auto",
        suffix_only: bool = True,
        compile_ffn: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, **kwargs)
        self.automatic_optimization = False
        self.optimized_sites = _SITES[optimize]
        self.rules = Rules(
            nll=nll_factor,
            kl=kl_factor,
            norm=norm_factor,
            steps=steps,
            clamp=clamp,
            loss_tolerance=loss_tolerance,
            argmax_rule=stop_at_argmax and optimize != "hidden",
            realized=target_value == "realized",
            attention_steps=attention_steps,
        )
        self.construction: Construction = "spread"
        self.merge_equal_keys = merge_equal_keys
        self.optimizer_callable = optimizer
        self.given_contexts = None if contexts is None else check_contexts(contexts)
        self.context_count, self.context_length, self.seed = context_count, context_length, seed
        self.targets_folder, self.suffix_only, self.compile_ffn = targets_folder, suffix_only, compile_ffn
        self.micro_batch: int | Literal["auto"] = "auto" if micro_batch == "auto" else int(micro_batch)

        # One parameter for each active edit: their number and width are not known yet.
        self.deltas = nn.ModuleDict(
            {site: nn.ParameterList([nn.Parameter(torch.zeros(0))]) for site in self.optimized_sites}
        )
        self.contexts: list[str] = []
        self.given_targets: Sequence[Target | None] = []  # of the edits of the run, where some are only written again
        self.written: Sequence[Edit] = ()  # the edits in the weights; set by what writes them
        self._store_depends: dict[str, Any] | None = None
        self._store_batch = -1
        self._suffix_works: bool | None = None  # for this model, once that was looked at

    def setup(self, stage: str) -> None:
        """Check the layers and the model family by the configuration alone, before any weight is read.

        Raises:
            ValueError: If the attention's delta is to be taken away, and there is none, or no step without it.
        """
        super().setup(stage)
        steps = self.rules.attention_steps
        if steps is not None and (self.optimized_sites != ("attn", "ffn") or steps >= self.rules.steps):
            raise ValueError(
                f"--model.attention_steps is {steps}, expected fewer than --model.steps ({self.rules.steps}), and "
                "--model.optimize attn+ffn; set it to null to keep the attention's delta"
            )
        if self.target_layer == self.depth - 1:
            log.warning(
                "layer %d is the model's last: a target there changes only the token right after a subject, and "
                "nothing in prompts that continue; leave the upper layers out of --model.layers", self.target_layer,
            )  # fmt: skip

    def configure_model(self) -> None:
        """Load the model."""
        loaded = self.lm is not None
        super().configure_model()
        self._drop_absent_attention()
        if self.compile_ffn and not loaded:
            for block in map(self.sites.ffn_block, self._above(self._delta_layers[0])):
                if block is not None:
                    # Hooks stay outside of what is compiled: they come and go.
                    block.forward = torch.compile(block.forward, dynamic=True)  # type: ignore[method-assign]

    def _drop_absent_attention(self) -> None:
        """Where no layer of the deltas has attention, as in hybrids, only the FFN's output gets a delta."""
        layers = self._delta_layers
        if "attn" in self.optimized_sites and not any(self.sites.has("attn", layer) for layer in layers):
            log.warning(
                "layer %s has no attention (the layers %s have): only its FFN output gets a delta",
                ", ".join(map(str, layers)), self.sites.layers_with("attn"),
            )  # fmt: skip
            self.optimized_sites = ("ffn",)
            del self.deltas["attn"]

    @property
    def delta_dtype(self) -> torch.dtype:
        """Deltas, losses and Adam's state: float32, or float64 for a float64 model."""
        weight = next(self.model.parameters())
        return torch.promote_types(weight.dtype, torch.float32)

    @property
    def target_layer(self) -> int:
        """L, the last edited layer."""
        return self.layers[-1]

    @property
    def target_layers(self) -> list[int]:
        """The layers that have targets."""
        return target_layers(self.layers, self.construction)

    @property
    def written_layers(self) -> list[int]:
        """The layers that are written."""
        return written_layers(self.layers, self.construction)

    # ---- the targets -----------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """One optimizer over all deltas, each a parameter of its own (docs/method.md, choice 7: one Adam per edit)."""
        return self.optimizer_callable(self.deltas.parameters())

    @property
    def optimizer_settings(self) -> list[Any]:
        """Name and settings of the optimizer."""
        optimizer = self.optimizer_callable([nn.Parameter(torch.zeros(1))])
        return [type(optimizer).__name__, {k: v for k, v in optimizer.defaults.items() if k != "params"}]

    def on_fit_start(self) -> None:
        """Fix the contexts of the run."""
        self._store_depends = None  # those of an earlier run is for the model as it was then
        if self.given_contexts is not None:
            self.contexts = self.given_contexts
        elif not self.contexts:
            self.contexts = self._sampled_contexts()
        self.contexts = self.trainer.strategy.broadcast(self.contexts)
        log.info("contexts: %s", self.contexts)

    def _sampled_contexts(self) -> list[str]:
        """Contexts sampled from the model, or those that an equal run has kept beside its targets."""
        sampling = {"count": self.context_count, "length": self.context_length, "seed": self.seed}
        store = None
        if self.targets_folder is not None:
            names = {"model": self.base_fingerprint, "tokenizer": self.encoder.fingerprint()}
            store = ContextStore(self.targets_folder, names | sampling)
            kept = ProcessGroup.of(self.trainer).compute_object_on_rank_zero(store.load)
            if kept is not None:
                return kept
        contexts = sample_contexts(self.model, self.tokenizer, device=self.device, **sampling)
        if store is not None and self.trainer.is_global_zero:
            store.save(contexts)
        return contexts

    def training_step(self, batch: EditBatch, batch_idx: int) -> dict[str, list[Target]]:
        """Optimize this process's part of an edit batch, except for targets that are given or in the store.

        Returns:
            ``targets``: one for each of its edits, in order.
        """
        if not batch.edits:  # written before the run was resumed
            return {"targets": []}
        given = self._given(batch)
        given |= self._missing(batch.edits, batch_idx, given, early_layers(self.layers, self.construction))
        return {"targets": [given[i] for i in ProcessGroup.of(self.trainer).shard(range(len(batch.edits)))]}

    @torch.enable_grad()
    def successive_targets(
        self, edits: Sequence[Edit], targets: Sequence[Target], layer: int, edit_batch: int
    ) -> list[Target]:
        """This process's targets with those of a further layer, found on the model as it is now.

        Args:
            edits: The whole edit batch, which is written in the layers below.
            targets: The targets of this process's edits so far.
            layer: The layer.
            edit_batch: Number of the edit batch.
        """
        self._store_depends = None  # the model has changed
        found = self._missing(edits, edit_batch, (), [layer])
        own = ProcessGroup.of(self.trainer).shard(range(len(edits)))
        return [join_targets([target, found[i]]) for i, target in zip(own, targets, strict=True)]

    def _missing(
        self, edits: Sequence[Edit], edit_batch: int, given: Collection[int], layers: Sequence[int]
    ) -> dict[int, Target]:
        """The targets in some layers that this process needs and that are not given, by the edits' index."""
        if len(given) == len(edits):
            return {}
        processes = ProcessGroup.of(self.trainer)
        everyone = [*edits, *(self.written[i] for i in self.companions(edits))]
        groups = self.key_groups(everyone)
        assigned = [i for i, first in enumerate(groups.first) if processes.owns(first) and first not in given]
        in_layers = [self._in_layer(layer, everyone, edit_batch, assigned, groups) for layer in layers]
        found = {i: join_targets([targets[i] for targets in in_layers]) for i in assigned}
        if processes.size > 1 and not groups.all_alone:
            foreign = [(i, target) for i, target in found.items() if not processes.owns(i)]
            found |= dict(processes.all_gather_lists(foreign))
        return found

    def _given(self, batch: EditBatch) -> dict[int, Target]:
        """The given targets of an edit batch by the edits' index in it."""
        if not self.given_targets:
            return {}
        targets = [self.given_targets[position] for position in batch.positions]
        given = {i: target for i, target in enumerate(targets) if target is not None}
        if self.construction != "successive":
            return given
        # Those of later layers are for a model in which all facts of then were written below.
        return {
            i: replace(t, values={p: v for p, v in t.values.items() if p[1] == self.layers[0]})
            for i, t in given.items()
        }

    def _in_layer(
        self, layer: int, edits: Sequence[Edit], batch_idx: int, assigned: Sequence[int], groups: KeyGroups
    ) -> dict[int, Target]:
        """The targets that some of the edits have in a layer, from the store or, group by group, by search."""
        processes, store = ProcessGroup.of(self.trainer), self._target_store(batch_idx, layer)
        names = groups.identities(edits) if store else []
        found = {i: store.load(names[i]) for i in assigned} if store else {}
        found = processes.broadcast_if_sharded(found)
        incomplete = {groups.first[i] for i in assigned if found.get(i) is None}
        missing = [i for i in assigned if groups.first[i] in incomplete]
        targets = {i: target for i, target in found.items() if target is not None}
        what = "Targets" if len(self._delta_layers) == 1 else f"Targets of layer {layer}"
        with counter(self.trainer, len(missing), numbered(self.trainer, what, batch_idx), "edit") as bar:
            for k, target in self.iter_targets([edits[i] for i in missing], layer):
                targets[missing[k]] = target
                if store and processes.is_writer:
                    store.save(names[missing[k]], target)
                bar.update(1)
        return targets

    def companions(self, edits: Sequence[Edit]) -> list[int]:
        """Positions of the written edits with which those of an edit batch share their targets."""
        return companions(edits, self.written, self.encoder) if self.merge_equal_keys else []

    def key_groups(self, edits: Sequence[Edit]) -> KeyGroups:
        """Which edits share their targets."""
        return KeyGroups.of(edits, self.encoder) if self.merge_equal_keys else KeyGroups(list(range(len(edits))))

    def iter_targets(self, edits: Sequence[Edit], layer: int) -> Iterator[tuple[int, Target]]:
        """Find the target vectors that some edits have in a layer, on the model as it is now.

        Yields:
            The index of an edit in ``edits``, and its target, in the order in which they are found.

        Raises:
            FloatingPointError: If a loss is not finite; the message names the edit.
            RuntimeError: If not even one edit fits into memory.
        """
        if not edits:
            return
        requests = [
            Request(target_rows(edit, self.contexts, self.encoder), edit.origin or edit.question, group)
            for edit, group in zip(edits, self.key_groups(edits).first, strict=True)
        ]
        yield from self._loop(layer, requests).run(requests)

    def _loop(self, layer: int, requests: Sequence[Request]) -> TargetLoop:
        """The loop that finds targets in a layer; the slots of an earlier one are no longer trained."""
        modules = {site: self.sites.module(site, layer) for site in self._sites_in(layer)}
        optimizer = self.optimizers()
        sharded = self._trainer is not None and ProcessGroup.of(self.trainer).sharded
        self._check_suffix(requests[0], layer, modules, direct=not sharded)
        broadcast = ProcessGroup.of(self.trainer).broadcast_if_sharded if sharded else None
        count = choose_micro_batch(self.micro_batch, requests, self._size(layer, direct=not sharded), self.device)
        slots = self._slots(list(modules), count if broadcast is None else broadcast(count))
        return TargetLoop(
            model=self.model,
            layer=layer,
            modules=modules,
            slots=slots,
            optimizer=optimizer.optimizer,  # type: ignore[union-attr]
            step=optimizer.step,  # type: ignore[union-attr]
            rules=self.rules,
            partial_forward=self._partial_forward(layer, direct=not sharded) if self._begins_late(layer) else None,
            pad_id=self.encoder.pad_id,
            padding_side=self.padding_side,
            sync_every=SYNC_EVERY.get(self.device.type, _SYNC_EVERY_ELSEWHERE),
            log_means=lambda means: self.log_step(LIVE, means),
            later=self._later(layer),
            broadcast=broadcast,
        )

    def _check_suffix(self, request: Request, layer: int, modules: Mapping[SiteName, nn.Module], direct: bool) -> None:
        """Find out, once, whether passes may begin at a layer of this model."""
        if self._suffix_works is not None or not self._begins_late(layer):
            return
        if self.architecture_override is None:
            self._suffix_works = has_plain_cache(self.model, self.device)
        else:
            rows, partial_forward = request.rows[:-1], self._partial_forward(layer, direct)
            self._suffix_works = suffix_agrees(self.model, modules, partial_forward, rows, self.width, self.device)

    def find_targets(self, edits: Sequence[Edit]) -> list[Target]:
        """The targets of some edits, in their order; raises what :meth:`iter_targets` does."""
        layers = [dict(self.iter_targets(edits, layer)) for layer in self._delta_layers]
        return [join_targets([found[i] for found in layers]) for i in range(len(edits))]

    def _slots(self, sites: Sequence[SiteName], count: int) -> DeltaSlots:
        """Slots for so many deltas, registered as parameters of this module and of its optimizer."""
        slots = DeltaSlots(sites, count, self.width, self.delta_dtype, self.device)
        for site, parameters in slots.parameters.items():
            self.deltas[site] = nn.ParameterList(parameters)
        optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
        optimizer.state.clear()
        optimizer.param_groups[0]["params"] = [p for parameters in slots.parameters.values() for p in parameters]
        return slots

    @property
    def _delta_layers(self) -> list[int]:
        return delta_layers(self.layers, self.construction)

    def _sites_in(self, layer: int) -> list[SiteName]:
        """The optimized sites that a layer has."""
        return [site for site in self.optimized_sites if site != "attn" or self.sites.has(site, layer)]

    def _later(self, layer: int) -> dict[ProjectionId, nn.Module]:
        """Modules whose outputs become targets while the deltas of a layer are in place, in running order."""
        above = [upper for upper in self.target_layers if upper > layer] if self.construction == "replay" else []
        return {(site, i): self.sites.module(site, i) for i in above for site in self._sites_in(i)}

    def _partial_forward(self, layer: int, direct: bool) -> PartialForward:
        layers = [self.sites.module("hidden", i) for i in range(self.depth)]
        modules = [module for i in self._above(layer) for module in self.sites.token_modules(i)]
        top = self.depth - 1
        blocks = [self.sites.ffn_block(top) or self.sites.module("ffn", top)] if self.sites.has("ffn", top) else []
        last = [*blocks, *([self.sites.module("attn", top)] if self.sites.has("attn", top) else [])]
        return PartialForward(layers, layer + 1, modules, last, direct)

    def _above(self, layer: int) -> range:
        return range(layer + 1, self.depth)

    def _begins_late(self, layer: int) -> bool:
        """``suffix_only``, if there is a layer above for a pass to begin at, and what precedes it can be kept."""
        return self.suffix_only and layer + 1 < self.depth and self._suffix_works is not False

    def _size(self, layer: int, direct: bool) -> ModelSize:
        """The size of the model, which decides how many edits fit into memory."""
        whole = not self._begins_late(layer)
        return ModelSize(
            width=self.width,
            layers=self.depth,
            layers_run=self.depth if whole else self.depth - layer,
            vocabulary=int(self.model.get_output_embeddings().weight.shape[0]),  # type: ignore[operator,union-attr]
            itemsize=next(self.model.parameters()).element_size(),
            whole_rows=whole,
            whole_logits=whole or not direct,
        )

    def _target_store(self, edit_batch: int, layer: int) -> TargetStore | None:
        """The store for a layer of the model as it is now; a later edit batch works on other weights."""
        if self.targets_folder is None:
            return None
        if self._store_depends is None or self._store_batch != edit_batch:
            self._store_batch = edit_batch
            self._store_depends = {
                "model": fingerprint(self.model),
                "tokenizer": self.encoder.fingerprint(),
                "contexts": self.contexts,
                "architecture": vars(self.sites.architecture),
                "sites": self.optimized_sites,
                "rules": {name: value for name, value in vars(self.rules).items() if value is not None},
                "optimizer": self.optimizer_settings,
            }
        return TargetStore(self.targets_folder, self._store_depends | {"layer": layer}, list(self._later(layer)))

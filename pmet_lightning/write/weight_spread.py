"""The write (docs/method.md, 'Keys' and 'The write') as a callback: after each edit batch, targets become weights.

The layers are written lowest first; keys and residuals are measured again for each, on the model as edited so far.
Legend: N = edits of the edit batch, n = those of this process, O = out-features, I = in-features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.mixins import HyperparametersMixin
from torch import Tensor, nn

from pmet_lightning.data.datamodule import EditBatch
from pmet_lightning.data.edit_rows import BARE, whole_row
from pmet_lightning.data.records import Edit
from pmet_lightning.data.token_rows import TokenRow
from pmet_lightning.model.architectures import ProjectionId, SiteName, WriteChoice, written_sites
from pmet_lightning.model.fsdp import unshard, weight_norm, whole_weight
from pmet_lightning.model.output_norms import pull_back
from pmet_lightning.model.projections import add_to_weight, in_features, is_transposed
from pmet_lightning.moments.second_moments import SecondMoments
from pmet_lightning.solver.bounded import mean_square, share_of_change, solve_bounded
from pmet_lightning.solver.update import Solution, multiply_transposed
from pmet_lightning.solver.weight_delta import WeightDelta
from pmet_lightning.targets.construction import Construction
from pmet_lightning.targets.store import Target, since_unedited, stack_values
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.callbacks import find_callback
from pmet_lightning.utils.distributed import ProcessGroup, sums_are_less
from pmet_lightning.utils.progress import track
from pmet_lightning.utils.types import PositiveFloat
from pmet_lightning.write.edited_weights import EditedWeights
from pmet_lightning.write.facts import replaced_by, written_facts
from pmet_lightning.write.keys import KeyRows, measure_all_keys, measure_keys, measure_rest, measure_values
from pmet_lightning.write.preserved import Preserved
from pmet_lightning.write.residual import ResidualTracker, SiteTarget, SpreadRule, mean_of_moving, residual_share
from pmet_lightning.write.write_report import LayerReport, WriteReport, add_outcomes, log_writes
from pmet_lightning.write.write_state import Aims, WriteState

log = logging.getLogger(__name__)

PUBLISHED_LOAD = 0.61  # 10,000 edits in the 16,384 key dimensions of GPT-J


class WeightSpread(HyperparametersMixin, L.Callback):
    """Writes each edit batch into the weights by the closed-form update, spread over the edited layers.

    Args:
        lam: λ, weight of the second moments relative to the new keys, as a number of preserved keys.
        rule: Share of the residual that a layer takes: one over the square root of the number of layers left (PMET),
            or one over that number (MEMIT). With targets of their own layers take all of their residual.
        targets: Where the layers' targets come from: one in the last layer, whose residual is 'spread' over all (PMET,
            MEMIT); their 'own' in the first and the last layer, each found by gradient, which are the only ones that
            are written then (BLUE); one in the first layer and a 'replay' of what layers above make of it (FE); or
            'successive' ones, found by gradient in each layer after those below have been written.
        write: Weights that are written: the FFN's (PMET), or the attention's too (ablation).
        max_change: c, bound on what writes do to other keys: λ is raised, for each weight, until the mean squared
            change of the values of preserved keys, relative to their mean square, is at most c·N/(N + d_k) for N edits
            in d_k key dimensions (for example 0.5); earlier edit batches have had their part of it, as if all were one.
            Null leaves λ as it is.
        null_space: Share of the second moment that the directions written to may hold together (AlphaEdit's
            projection; for example 0.01); null writes to all directions.
        protect_past: Whether the keys of earlier edit batches are preserved too (K_past K_pastᵀ is added to λC + KKᵀ,
            inside the null space too, which stays that of C). True keeps them beside the patch. Null does so if there
            are edit batches (--data.edit_batch), else measures them again before anything else is written.
        preserve_prompts: μ, weight relative to a new key with which the tokens after the subject in the edit prompts
            and their targets are preserved (μRRᵀ of their keys R is added likewise; with protect_past also those of
            earlier edit batches); null preserves general text alone.

    Attributes:
        edited: What it has written, with rollback.
        keeps_keys: Whether the keys of an edit batch are kept in memory for those that follow.
        stores_keys: Whether they belong into the run's folder, so that a resumed run ends as if it had not stopped.
    """

    def __init__(
        self,
        lam: PositiveFloat = 6000.0,
        rule: SpreadRule = "sqrt",
        targets: Construction = "spread",
        write: WriteChoice = "ffn",
        max_change: PositiveFloat | None = None,
        null_space: PositiveFloat | None = None,
        protect_past: bool | None = None,
        preserve_prompts: PositiveFloat | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.lam, self.rule, self.targets = float(lam), rule, targets
        self.max_change, self.null_space, self.protect_past = max_change, null_space, protect_past
        self.preserve_prompts = preserve_prompts
        self.keeps_keys = self.stores_keys = bool(protect_past)
        self.sites = written_sites(write)
        self.edited = EditedWeights(self.sites)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that what is written is optimized, and tell the module where its targets are needed.

        Raises:
            TypeError: If the module is not a TargetOptimizer.
            ValueError: If the attention is written without a delta of its own.
        """
        if not isinstance(pl_module, TargetOptimizer):
            raise TypeError(f"WeightSpread works with TargetOptimizer, got {type(pl_module).__name__}")
        if "attn" in self.sites and "attn" not in pl_module.optimized_sites:
            raise ValueError(
                "--spread.write attn+ffn writes the attention, which has no target: set --model.optimize attn+ffn"
            )
        pl_module.construction = self.targets
        if self.protect_past is None and getattr(trainer.datamodule, "edit_batch", None) is not None:  # type: ignore[attr-defined]
            self.keeps_keys = self.stores_keys = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: EditBatch, batch_idx: int
    ) -> None:
        """Tell the module what is in the weights: an edit about the same subject may share its target."""
        assert isinstance(pl_module, TargetOptimizer)
        pl_module.written = [fact.edit for fact in self.edited.facts]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Write the edit batch, and pass its report on to the callbacks that follow."""
        assert isinstance(pl_module, TargetOptimizer)
        if batch.edits:
            outputs["written"] = self.write_batch(
                trainer, pl_module, batch.edits, outputs["targets"], batch_idx + pl_module.batches_done
            )

    @torch.no_grad()
    def write_batch(
        self,
        trainer: L.Trainer,
        module: TargetOptimizer,
        edits: Sequence[Edit],
        targets: Sequence[Target],
        edit_batch: int,
    ) -> WriteReport:
        """Write one edit batch: all of its layers or, if anything fails or is interrupted, none.

        Each process measures its own edits, the first process solves, and all write the same.

        Args:
            trainer: The trainer.
            module: The module with the model.
            edits: The whole edit batch.
            targets: The targets of this process's own edits.
            edit_batch: Number of the edit batch.

        Raises:
            FloatingPointError: If anything is not finite; the weights are then what they were.
            RuntimeError: If the trainer has no callback SecondMoments.
        """
        second_moments = find_callback(trainer, SecondMoments)
        if second_moments is None:
            raise RuntimeError("WeightSpread needs the callback SecondMoments beside it in the Trainer")
        if not self.edited.base_norms:
            self.edited.record_base_norms(module)
        processes = ProcessGroup.of(trainer)
        rows = _key_rows(module, processes.shard(edits))
        remedy = "raise --spread.lam" if self.max_change is None else "lower --spread.max_change"
        _warn_if_overloaded(module, len(edits), remedy)
        written = module.sites.written(self.sites, module.written_layers)
        layers: list[LayerReport] = []
        with self.edited.transaction([module.sites.module(*p) for p in written]) as draft:
            earlier, staying = self.edited.facts, self._staying(module, edits)
            past_keys = self._past_keys(module, processes, written)
            prompts = self._prompts(module, processes, edits, staying[0])
            state = WriteState(module, second_moments, processes, len(edits), draft, *staying, past_keys, prompts, rows)
            for together in self._groups(written):
                if layers:  # those below are written
                    targets = module.successive_targets(edits, targets, together[-1][1], edit_batch)
                reports, left_N = self._write_towards(trainer, state, targets, together)
                layers.extend(reports)
            if self.targets == "successive":
                targets = [since_unedited(target) for target in targets]
            all_targets = processes.all_gather_objects(targets, len(edits))
            draft.facts = (*(earlier[i] for i in state.kept), *written_facts(edits, all_targets, edit_batch))
        log_writes(layers, edit_batch)
        return WriteReport(
            edit_batch, tuple(edits), tuple(all_targets), tuple(layers), tuple(left_N.nan_to_num(0.0).tolist())
        )

    def _groups(self, written: Sequence[ProjectionId]) -> list[list[ProjectionId]]:
        """What is written towards the same targets in the last layer: all, or each layer by itself."""
        if self.targets != "successive":
            return [list(written)]
        return [[p for p in written if p[1] == layer] for layer in dict.fromkeys(layer for _, layer in written)]

    def _write_towards(
        self, trainer: L.Trainer, state: WriteState, targets: Sequence[Target], written: Sequence[ProjectionId]
    ) -> tuple[tuple[LayerReport, ...], Tensor]:
        """Write some projections, and measure how far the values of the last layer have come.

        Returns:
            A report for each write, and what is left of each edit's residual of the FFN, shape [N].
        """
        module, goals = state.module, self._goals(state.module, targets, written)
        last = {site: goals[site, layer] for site, layer in written}
        aims = Aims(goals, last, ("hidden", written[-1][1]))
        value_sites = [*(target.projection_id for target in last.values()), aims.stream]
        *values, stream_nF = measure_values(module.model, module.sites, value_sites, state.rows)
        tracker = ResidualTracker(
            {site: target.residual for site, target in last.items()}, values, stream_nF, state.processes, state.count
        )
        reports = [self._measure_and_write(state, aims, place, tracker) for place in track(trainer, written, "Layers")]
        *values, stream_nF = measure_values(module.model, module.sites, value_sites, state.rows)
        left = {site: tracker.left(site, value) for site, value in zip(last, values, strict=True)}
        tracker.record_overshoot(stream_nF)
        means = {site: mean_of_moving(values_N) for site, values_N in left.items()}
        return add_outcomes(reports, means, tracker.overshoots[1:]), left["ffn"]

    def _staying(self, module: TargetOptimizer, edits: Sequence[Edit]) -> tuple[list[int], list[int]]:
        """Positions of the written facts that edits do not correct, and of those whose keys get no new value either."""
        replaced = set(replaced_by(self.edited.facts, edits))
        kept = [i for i in range(len(self.edited.facts)) if i not in replaced]
        return kept, sorted(set(kept) - set(module.companions(edits)))

    def _prompts(
        self, module: TargetOptimizer, processes: ProcessGroup, edits: Sequence[Edit], kept: Sequence[int]
    ) -> list[TokenRow]:
        """This process's rows whose tokens after the subject are preserved."""
        if self.preserve_prompts is None:
            return []
        past = [] if self.protect_past is False else [self.edited.facts[i].edit for i in kept]
        return [whole_row(edit, BARE, module.encoder) for edit in processes.shard([*past, *edits])]

    def _measure_and_write(
        self, state: WriteState, aims: Aims, projection_id: ProjectionId, tracker: ResidualTracker
    ) -> LayerReport:
        """Measure keys and residuals of one projection, on the model as edited so far, and write its weight."""
        module, (site, layer) = state.module, projection_id
        goal, last = aims.goals[projection_id], aims.last[site]
        places = dict.fromkeys([projection_id, goal.projection_id, last.projection_id])
        observed = sorted(places, key=lambda place: place[1])
        keys_nI, found = measure_keys(module.model, module.sites, projection_id, [*observed, aims.stream], state.rows)
        *values, stream_nF = found
        value_of = dict(zip(observed, values, strict=True))
        tracker.record_overshoot(stream_nF)
        output_nO, layers_left = value_of[projection_id], len(module.layers) - module.layers.index(layer)
        share = residual_share(layers_left, self.rule) if self.targets == "spread" else 1.0
        share_nO = goal.residual(value_of[goal.projection_id]) * share
        norm = module.sites.norm(site, layer)
        if norm is not None:
            share_nO = pull_back(unshard(norm, output_nO.device), output_nO, share_nO)
        residual = mean_of_moving(tracker.left(site, value_of[last.projection_id]))
        rest_II = None
        if self.preserve_prompts is not None:
            own_II = measure_rest(module.model, module.sites, projection_id, state.prompts, state.rows)
            rest_II = state.processes.all_reduce_sum(own_II).mul_(self.preserve_prompts)
        solve = self._build_solve(state, projection_id, keys_nI, share_nO, rest_II)
        return self._write(state, projection_id, module.sites.module(site, layer), solve, residual)

    def _write(
        self,
        state: WriteState,
        projection_id: ProjectionId,
        projection: nn.Module,
        solve_with: Callable[[float], Solution],
        residual: float,
    ) -> LayerReport:
        """Write one weight, the same on each process, with what solves for ΔW on the first, given λ."""
        weight = projection.weight
        assert isinstance(weight, Tensor)
        dtype, device = state.module.delta_dtype, state.module.device
        solve = self._bounded(solve_with, state, projection_id, projection)
        tensors, (solution, lam) = state.processes.compute_on_rank_zero(partial(_split_solution, solve, dtype), device)
        delta = WeightDelta.of(tensors)
        norm_before = weight_norm(weight, dtype)
        stored = add_to_weight(projection, delta.dense())
        name = state.module.sites.weight_name(*projection_id)
        state.draft.deltas[name] = self.edited.total_with(name, delta)
        return LayerReport(
            *projection_id,
            residual,
            norm_ratio=delta.norm() / norm_before,
            growth=self.edited.growth(name, state.draft.deltas[name]),
            lam=lam,
            solve_error=solution.solve_error,
            ridge=solution.ridge,
            condition_bound=solution.condition_bound,
            **vars(stored),
        )

    def _bounded(
        self, solve: Callable[[float], Solution], state: WriteState, projection_id: ProjectionId, projection: nn.Module
    ) -> Callable[[], tuple[Solution, float]]:
        """A function that solves with λ, or with one that keeps the change of preserved values within its bound."""
        if self.max_change is None:
            return lambda: (solve(self.lam), self.lam)
        bound = self.max_change * share_of_change(state.count, len(state.kept), in_features(projection))
        whole = whole_weight(projection.weight)  # type: ignore[arg-type]

        def solve_within() -> tuple[Solution, float]:
            moment_II = state.second_moments.moment(projection_id).to(whole.device, torch.float64)
            values = mean_square(WeightDelta(whole.T if is_transposed(projection) else whole), moment_II)
            return solve_bounded(
                solve, lambda solution: mean_square(solution.delta, moment_II) / values, self.lam, bound
            )

        return solve_within

    def _build_solve(
        self,
        state: WriteState,
        projection_id: ProjectionId,
        keys_nI: Tensor,
        share_nO: Tensor,
        rest_II: Tensor | None,
    ) -> Callable[[float], Solution]:
        """A function of λ that solves for ΔW from all processes' keys and residuals or, if smaller, their products.

        ``rest_II``: μRRᵀ of all processes.
        """
        past_PI = _rows(state.past_keys, projection_id, state.protected)
        device = state.module.device
        preserved = Preserved(projection_id, state.second_moments, device, self.null_space, past_PI, rest_II)
        whole = self.keeps_keys or self.null_space is not None or state.processes.size == 1
        if not whole and sums_are_less(state.count, keys_nI, share_nO):
            products_II = state.processes.all_reduce_sum(multiply_transposed(keys_nI, keys_nI))
            right_OI = state.processes.all_reduce_sum(multiply_transposed(share_nO, keys_nI))
            return partial(preserved.update_from_sums, right_OI, products_II)
        keys_NI = state.processes.all_gather(keys_nI, state.count)
        share_NO = state.processes.all_gather(share_nO, state.count)
        if self.keeps_keys and state.processes.is_rank_zero:
            kept_PI = _rows(state.past_keys, projection_id, state.kept)
            state.draft.past_keys[projection_id] = torch.cat([*([] if kept_PI is None else [kept_PI]), keys_NI.cpu()])
        return partial(preserved.update, share_NO, keys_NI)

    def _past_keys(
        self, module: TargetOptimizer, processes: ProcessGroup, written: Sequence[ProjectionId]
    ) -> Mapping[ProjectionId, Tensor]:
        """Keys of all facts in the weights, on the first process; those that were not kept are measured again."""
        edits = [fact.edit for fact in self.edited.facts]
        if self.protect_past is False or not edits:
            return {}
        if processes.compute_object_on_rank_zero(lambda: bool(self.edited.past_keys)):
            return self.edited.past_keys
        log.info("measuring the keys of %d facts that are in the weights, to protect them", len(edits))
        keys = measure_all_keys(module.model, module.sites, written, _key_rows(module, processes.shard(edits)))
        found = zip(written, keys, strict=True)
        return {place: processes.all_gather(keys_nI.to(module.device), len(edits)).cpu() for place, keys_nI in found}

    def _value_site(self, module: TargetOptimizer, site: SiteName) -> SiteName:
        """The site whose values give a written site's target and residual (MEMIT: the layer's output)."""
        return site if site in module.optimized_sites else "hidden"

    def _goals(
        self, module: TargetOptimizer, targets: Sequence[Target], written: Sequence[ProjectionId]
    ) -> dict[ProjectionId, SiteTarget]:
        """What each projection is written towards: the target in layer L that is spread, or one of its own layer."""
        layer_of = {p: module.target_layer if self.targets == "spread" else p[1] for p in written}
        return {p: self._site_target(module, targets, (p[0], layer)) for p, layer in layer_of.items()}

    def _site_target(
        self, module: TargetOptimizer, targets: Sequence[Target], projection_id: ProjectionId
    ) -> SiteTarget:
        site, layer = projection_id
        values_at: ProjectionId = (self._value_site(module, site), layer)
        empty = torch.empty(0, module.width, dtype=module.delta_dtype)  # of a process without an edit
        goal_nO = (stack_values(targets, values_at) if targets else empty).to(module.device)
        norm = module.sites.norm(*values_at)
        return SiteTarget(values_at, goal_nO, None if norm is None else unshard(norm, module.device))


def _key_rows(module: TargetOptimizer, edits: Sequence[Edit]) -> KeyRows:
    """The rows in which keys of edits are measured, on a module's model and in its contexts."""
    return KeyRows.of(edits, module.contexts, module.encoder, module.tokens_per_batch, module.device)


def _rows(keys: Mapping[ProjectionId, Tensor], projection_id: ProjectionId, facts: Sequence[int]) -> Tensor | None:
    """Keys of some facts; ``None`` if there are none."""
    keys_PI = keys.get(projection_id)
    return keys_PI[facts] if keys_PI is not None and facts else None


def _split_solution(
    solve: Callable[[], tuple[Solution, float]], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Solution, float]]:
    """Solve; returns the tensors of ΔW in the deltas' precision, and the solution without them with its λ."""
    solution, lam = solve()
    return solution.delta.to(dtype).tensors, (replace(solution, delta=WeightDelta(torch.empty(0, 0))), lam)


def _warn_if_overloaded(module: TargetOptimizer, count: int, remedy: str) -> None:
    """Warn when an edit batch has more edits for its key dimensions than any that was published."""
    width = in_features(module.sites.module("ffn", module.target_layer))
    if count > PUBLISHED_LOAD * width:
        log.warning(
            "%d edits in one edit batch are %.2f of the %d key dimensions (published: up to %.2f): they will "
            "disturb each other; %s, or make --data.edit_batch smaller",
            count, count / width, width, PUBLISHED_LOAD, remedy,
        )  # fmt: skip

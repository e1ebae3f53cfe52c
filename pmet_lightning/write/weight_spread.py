"""Steps 2 and 3 of METHOD.md as a callback: after each edit batch, targets become weights.

The layers are written lowest first, and keys and residuals are measured anew on the model as edited so far.
Legend: N = edits of the edit batch, n = those of this process, O = out-features, I = in-features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.mixins import HyperparametersMixin
from torch import Tensor, nn

from pmet_lightning.data.datamodule import EditBatch
from pmet_lightning.data.records import Edit
from pmet_lightning.model.architectures import Place, SiteName, WriteChoice, written_sites
from pmet_lightning.model.fsdp import norm_of, whole
from pmet_lightning.model.output_norms import pull_back
from pmet_lightning.model.projections import add_to_weight, in_features
from pmet_lightning.moments.second_moments import SecondMoments
from pmet_lightning.solver.null_space import solve_in_null_space
from pmet_lightning.solver.packed import packed_lower, unpacked_products
from pmet_lightning.solver.update import Solution, products, solve_sums, solve_update, solve_with_factor
from pmet_lightning.targets.store import Target, stack
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.callbacks import find_callback
from pmet_lightning.utils.distributed import Team, sums_are_less
from pmet_lightning.utils.progress import track
from pmet_lightning.utils.types import PositiveFloat
from pmet_lightning.write.edited_weights import Draft, EditedWeights
from pmet_lightning.write.keys import Measurement, current_values, measure
from pmet_lightning.write.residual import Aim, Arrival, SpreadRule, share
from pmet_lightning.write.write_report import LayerReport, WriteReport, log_writes, with_outcomes

log = logging.getLogger(__name__)

FEW_EDITS = 0.5  # of the key dimensions: up to here the solve with a stored factor is faster (benchmarks/solve.py)
PUBLISHED_LOAD = 0.61  # 10,000 edits in the 16,384 key dimensions of GPT-J


@dataclass(frozen=True)
class _Writing:
    """An edit batch while it is written.

    Attributes:
        module: The module with the model.
        second_moments: Where C comes from.
        team: The processes.
        count: N, the edits of all processes.
        draft: What has been written of it.
    """

    module: TargetOptimizer
    second_moments: SecondMoments
    team: Team
    count: int
    draft: Draft


class WeightSpread(HyperparametersMixin, L.Callback):
    """Writes each edit batch into the weights by the closed-form update, spread over the edited layers.

    Args:
        lam: λ, weight of the second moments against the new keys, in preserved keys.
        rule: Share of the residual that a layer takes: one over the square root of the layers left (PMET), or
            one over their number (MEMIT).
        write: Weights that are written: the FFN's (PMET) or the attention's too (ablation).
        null_space: Share of the second moment that the directions written to may hold together (AlphaEdit's
            projection, such as 0.01); null writes to all directions.
        protect_past: Whether the keys of earlier edit batches are preserved too (K_past K_pastᵀ is added to λC + KKᵀ,
            inside the null space too, which stays that of C).

    Attributes:
        edited: What it has written, and the way back.
    """

    def __init__(
        self,
        lam: PositiveFloat = 6000.0,
        rule: SpreadRule = "sqrt",
        write: WriteChoice = "ffn",
        null_space: PositiveFloat | None = None,
        protect_past: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.lam, self.rule = float(lam), rule
        self.null_space, self.protect_past = null_space, protect_past
        self.sites = written_sites(write)
        self.edited = EditedWeights(self.sites)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that what is written was optimised.

        Raises:
            TypeError: If the module is no TargetOptimizer.
            ValueError: If the attention is written without a delta of its own.
        """
        if not isinstance(pl_module, TargetOptimizer):
            raise TypeError(f"WeightSpread works with TargetOptimizer, got {type(pl_module).__name__}")
        if "attn" in self.sites and "attn" not in pl_module.sites_optimised:
            raise ValueError(
                "--spread.write attn+ffn writes the attention, which has no target: set --model.optimise attn+ffn"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Write the edit batch, and hand its report on to the callbacks that follow."""
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
        """Write one edit batch: all of its layers, or, if anything fails or interrupts, none.

        Each process measures its own edits, the first one solves, and all write the same.

        Args:
            trainer: The trainer.
            module: The module with the model.
            edits: The whole edit batch.
            targets: The targets of this process' own edits.
            edit_batch: Number of the edit batch.

        Raises:
            FloatingPointError: If anything is not finite; the weights are then what they were.
        """
        second_moments = find_callback(trainer, SecondMoments)
        if second_moments is None:
            raise RuntimeError("WeightSpread needs the callback SecondMoments beside it in the Trainer")
        if not self.edited.base_norms:
            self.edited.record_base_norms(module)
        team = Team.of(trainer)
        over = Measurement.of(team.own(edits), module.contexts, module.encoder, module.tokens_per_batch, module.device)
        _warn_of_overload(module, len(edits))
        aims = {site: self._aim(module, targets, site) for site in self.sites}
        projections = {(s, layer): module.sites.module(s, layer) for layer in module.layers for s in self.sites}
        stream: Place = ("hidden", module.target_layer)
        ends = [*(aim.place for aim in aims.values()), stream]
        *values, passed = current_values(module.model, module.sites, ends, over)
        arrival = Arrival({site: aim.lacking for site, aim in aims.items()}, values, passed, team, len(edits))
        reports: list[LayerReport] = []
        with self.edited.transaction(list(projections.values())) as draft:
            now = _Writing(module, second_moments, team, len(edits), draft)
            for place in track(trainer, list(projections), "Layers"):
                site, layer = place
                seen = [place, aims[site].place, stream]
                keys, (here, value, passed) = measure(module.model, module.sites, place, seen, over)
                arrival.pass_by(passed)
                layers_left = len(module.layers) - module.layers.index(layer)
                wanted = aims[site].lacking(value) * share(layers_left, self.rule)
                norm = module.sites.norm(site, layer)
                if norm is not None:
                    wanted = pull_back(whole(norm, here.device), here, wanted)
                residual = float(arrival.left(site, value).nanmean())
                reports.append(self._write(now, place, projections[place], keys, wanted, residual))
            *values, passed = current_values(module.model, module.sites, ends, over)
            left = {site: arrival.left(site, value) for site, value in zip(aims, values, strict=True)}
            arrival.pass_by(passed)
            everyone = team.gathered_objects(targets, len(edits))
        means = {site: float(values_N.nanmean()) for site, values_N in left.items()}
        written = with_outcomes(reports, means, arrival.overshoots[1:])
        log_writes(written, edit_batch)
        still = tuple(left["ffn"].nan_to_num(0.0).tolist())
        return WriteReport(edit_batch, tuple(edits), tuple(everyone), written, still)

    def _write(
        self, now: _Writing, place: Place, projection: nn.Module, keys_nI: Tensor, wanted_nO: Tensor, residual: float
    ) -> LayerReport:
        """Write one weight, the same on each process, from what each has measured for its own edits."""
        weight = projection.weight
        assert isinstance(weight, Tensor)
        out_features, in_width = wanted_nO.shape[1], keys_nI.shape[1]
        dtype, device = now.module.delta_dtype, now.module.device
        solve = self._system(now, place, keys_nI, wanted_nO)
        empty_OI = torch.empty(out_features, in_width, dtype=dtype, device=device)
        delta_OI, solution = now.team.from_first(partial(_parted, solve, dtype), empty_OI)
        norm_before = norm_of(weight, dtype)
        stored = add_to_weight(projection, delta_OI)
        name = now.module.sites.weight_name(*place)
        total_OI = delta_OI.cpu()
        if name in self.edited.deltas:
            total_OI = self.edited.deltas[name] + total_OI
        now.draft.deltas[name] = total_OI
        return LayerReport(
            *place,
            residual,
            norm_ratio=float(delta_OI.norm()) / norm_before,
            growth=self.edited.growth(name, total_OI),
            solve_error=solution.solve_error,
            ridge=solution.ridge,
            condition_bound=solution.condition_bound,
            **vars(stored),
        )

    def _system(self, now: _Writing, place: Place, keys_nI: Tensor, wanted_nO: Tensor) -> Callable[[], Solution]:
        """What solves for ΔW, with the keys and residuals of all processes or, where they are less, their products."""
        protect = self.protect_past and now.team.solves
        if now.team.size > 1 and self.null_space is None and sums_are_less(now.count, keys_nI, wanted_nO):
            products_II = now.team.total(products(keys_nI, keys_nI))
            right_OI = now.team.total(products(wanted_nO, keys_nI))
            if protect:
                now.draft.past_keys[place] = self._with_past(place, products_II)
            return partial(self._solution_of_sums, right_OI, products_II, place, now)
        keys_NI = now.team.gathered(keys_nI, now.count)
        wanted_NO = now.team.gathered(wanted_nO, now.count)
        if protect:
            now.draft.past_keys[place] = self._with_past(place, products(keys_NI, keys_NI))
        return partial(self._solution, wanted_NO, keys_NI, place, now)

    def _with_past(self, place: Place, products_II: Tensor) -> Tensor:
        """The sum with the products of earlier edit batches: a new tensor, one triangle, on the CPU."""
        packed = packed_lower(products_II.cpu())
        return packed.add_(self.edited.past_keys[place]) if place in self.edited.past_keys else packed

    def _solution(self, wanted_NO: Tensor, keys_NI: Tensor, place: Place, now: _Writing) -> Solution:
        if self.null_space is not None:
            space = now.second_moments.null_space(place, self.null_space)
            return solve_in_null_space(wanted_NO, keys_NI, space, self.lam, self._past_II(place, now))
        if len(keys_NI) <= FEW_EDITS * keys_NI.shape[1] and place not in self.edited.past_keys:
            try:
                return solve_with_factor(wanted_NO, keys_NI, now.second_moments.factor(place), self.lam)
            except FloatingPointError as error:
                log.info("%s: %s; solving without it", place, error)
        return solve_update(wanted_NO, keys_NI, self._protected(place, now), self.lam)

    def _solution_of_sums(self, right_OI: Tensor, products_II: Tensor, place: Place, now: _Writing) -> Solution:
        return solve_sums(right_OI, products_II, self._protected(place, now), self.lam)

    def _protected(self, place: Place, now: _Writing) -> Tensor:
        """C and, in its units, the keys of earlier edit batches, which count as much as the new ones."""
        moment_II, past_II = now.second_moments.moment(place).to(now.module.device), self._past_II(place, now)
        return moment_II if past_II is None else past_II.div_(self.lam).add_(moment_II)

    def _past_II(self, place: Place, now: _Writing) -> Tensor | None:
        """K_past K_pastᵀ, on the model's device, float64, shape [I, I]; ``None`` before the second edit batch."""
        return (
            unpacked_products(self.edited.past_keys[place], now.module.device)
            if place in self.edited.past_keys
            else None
        )

    def _value_site(self, module: TargetOptimizer, site: SiteName) -> SiteName:
        """Where a written site's target and residual are measured (MEMIT: the layer's output)."""
        return site if site in module.sites_optimised else "hidden"

    def _aim(self, module: TargetOptimizer, targets: Sequence[Target], site: SiteName) -> Aim:
        where = self._value_site(module, site)
        nothing = torch.empty(0, module.width, dtype=module.delta_dtype)  # of a process without an edit
        goal = (stack(targets, where) if targets else nothing).to(module.device)
        norm = module.sites.norm(where, module.target_layer)
        return Aim((where, module.target_layer), goal, None if norm is None else whole(norm, module.device))


def _parted(solve: Callable[[], Solution], dtype: torch.dtype) -> tuple[Tensor, Solution]:
    """ΔW in the deltas' precision, and the solution without it."""
    solution = solve()
    return solution.delta_OI.to(dtype), replace(solution, delta_OI=torch.empty(0))


def _warn_of_overload(module: TargetOptimizer, count: int) -> None:
    """Say so when a batch asks more of the weights than they can hold."""
    width = in_features(module.sites.module("ffn", module.target_layer))
    if count > PUBLISHED_LOAD * width:
        log.warning(
            "%d edits in one edit batch are %.2f of the %d key dimensions (published: up to %.2f): they will "
            "disturb each other; raise --spread.lam, or make --data.edit_batch smaller",
            count, count / width, width, PUBLISHED_LOAD,
        )  # fmt: skip

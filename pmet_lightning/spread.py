"""Steps 2 and 3 of METHOD.md as a callback: after each edit batch, targets become weights.

The layers are written lowest first, and keys and residuals are measured anew on the model as edited so far.
Legend: N = edits of the edit batch, O = out-features, I = in-features.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import PositiveFloat
from torch import Tensor, nn

from pmet_lightning.architectures import SiteName, Written, add_to_weight, in_features
from pmet_lightning.data import EditBatch
from pmet_lightning.edits import Edit
from pmet_lightning.keys import Measurement, collect_keys, collect_values
from pmet_lightning.module import TargetOptimizer
from pmet_lightning.moments import Place
from pmet_lightning.postnorm import pull_back
from pmet_lightning.progress import find_callback, track
from pmet_lightning.solve import (
    Solution,
    SpreadRule,
    WriteChoice,
    share,
    solve_in_null_space,
    solve_update,
    solve_with_factor,
    written_sites,
)
from pmet_lightning.stats import SecondMoments
from pmet_lightning.targets import Target, stack

log = logging.getLogger(__name__)

MUCH_ROUNDING = 0.5  # of ‖ΔW‖
FEW_EDITS = 0.5  # of the key dimensions: up to here the solve with a stored factor is faster (benchmarks/solve.py)
PUBLISHED_LOAD = 0.61  # 10,000 edits in the 16,384 key dimensions of GPT-J


@dataclass(frozen=True)
class LayerReport:
    """What one write did.

    Attributes:
        site: Written projection.
        layer: Its layer.
        keys_NI: Keys of the solve.
        values_NO: Value of each edit at the target layer before the write.
        residual: Mean over edits of ‖E‖, relative to that before the first write.
        norm_ratio: ‖ΔW‖ / ‖W‖.
        ridge: Ridge of the solve, on the diagonal of λC + KKᵀ.
        relative_error: Relative error of the linear system.
        written: How much of ΔW the stored weight has.
    """

    site: SiteName
    layer: int
    keys_NI: Tensor = field(repr=False)
    values_NO: Tensor = field(repr=False)
    residual: float
    norm_ratio: float
    ridge: float
    relative_error: float
    written: Written


@dataclass(frozen=True)
class SpreadReport:
    """What one edit batch left behind.

    Attributes:
        edit_batch: Its number.
        edits: The edits written.
        targets: Their targets.
        layers: One report for each write, in order.
        residual_left: ‖V* − value‖ after the last write relative to before the first, for each edit.
    """

    edit_batch: int
    edits: tuple[Edit, ...]
    targets: tuple[Target, ...]
    layers: tuple[LayerReport, ...]
    residual_left: tuple[float, ...]


class WeightSpread(L.Callback):
    """Writes each edit batch into the weights by the closed-form update, spread over the edited layers.

    Args:
        lam: λ, weight of the second moments against the new keys, in preserved keys.
        rule: Share of the residual that a layer takes: one over the square root of the layers left (PMET), or
            one over their number (MEMIT).
        write: Weights that are written: the FFN's (PMET) or the attention's too (ablation).
        null_space: Share of the second moment that the directions written to may hold together (AlphaEdit's
            projection, such as 0.01); null writes to all directions.
    """

    def __init__(
        self,
        lam: PositiveFloat = 6000.0,  # type: ignore[valid-type]
        rule: SpreadRule = "sqrt",
        write: WriteChoice = "ffn",
        null_space: PositiveFloat | None = None,  # type: ignore[valid-type]
    ) -> None:
        self.lam, self.rule = float(lam), rule
        self.null_space = null_space
        self.sites = written_sites(write)
        self.deltas: dict[str, Tensor] = {}
        self.report: SpreadReport | None = None
        self._edits: list[Edit] = []
        self._targets: list[Target] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that what is written was optimised, and that one process does it.

        Raises:
            TypeError: If the module is no TargetOptimizer.
            ValueError: If the attention is written without a delta of its own.
        """
        if not isinstance(pl_module, TargetOptimizer):
            raise TypeError(f"WeightSpread works with TargetOptimizer, got {type(pl_module).__name__}")
        if stage == "fit" and trainer.world_size > 1 and trainer.max_epochs != 0:  # 0: statistics alone
            raise ValueError(f"editing runs on one process for now, got {trainer.world_size}; set --trainer.devices 1")
        if "attn" in self.sites and "attn" not in pl_module.sites_optimised:
            raise ValueError(
                "--spread.write attn+ffn writes the attention, which has no target: set --model.optimise attn+ffn"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EditBatch, batch_idx: int
    ) -> None:
        """Keep the targets of a micro-batch; write when it closes its edit batch."""
        assert isinstance(pl_module, TargetOptimizer)
        self._edits += batch.edits
        self._targets += outputs["targets"]
        self.report = None
        if not batch.closes:
            return
        edits, targets = self._edits, self._targets
        self._edits, self._targets = [], []
        self.report = self.write_batch(trainer, pl_module, edits, targets, batch.edit_batch)

    @torch.no_grad()
    def write_batch(
        self,
        trainer: L.Trainer,
        module: TargetOptimizer,
        edits: Sequence[Edit],
        targets: Sequence[Target],
        edit_batch: int,
    ) -> SpreadReport:
        """Write one edit batch: all of its layers, or, if anything fails or interrupts, none.

        Raises:
            FloatingPointError: If anything is not finite; the weights are then what they were.
        """
        second_moments = find_callback(trainer, SecondMoments)
        if second_moments is None:
            raise RuntimeError("WeightSpread needs the callback SecondMoments beside it in the Trainer")
        over = Measurement.of(edits, module.contexts, module.encoder, module.tokens_per_batch, module.device)
        _warn_of_overload(module, len(edits))
        goals = {site: self._goal(module, targets, site) for site in self.sites}
        first = {site: self._values(module, goals[site], site, over)[1].norm(dim=-1) for site in self.sites}
        reports: list[LayerReport] = []
        deltas: dict[str, Tensor] = {}
        projections = {(s, layer): module.sites.module(s, layer) for layer in module.layers for s in self.sites}
        with _all_or_nothing(projections.values()):
            for place in track(trainer, list(projections), "Layers"):
                site, layer = place
                layers_left = len(module.layers) - module.layers.index(layer)
                keys = collect_keys(module.model, module.sites, site, layer, over)
                values, residual = self._values(module, goals[site], site, over)
                wanted = residual * share(layers_left, self.rule)
                norm = module.sites.norm(site, layer)
                if norm is not None:
                    here = collect_values(module.model, module.sites, site, layer, over)
                    wanted = pull_back(norm, here, wanted)
                solution = self._solve(wanted, keys, place, second_moments, module.device)
                delta = solution.delta_OI.to(module.delta_dtype)
                weight = projections[place].weight
                assert isinstance(weight, Tensor)
                ratio = float(delta.norm() / weight.to(delta.dtype).norm())
                written = add_to_weight(projections[place], delta)
                deltas[module.sites.weight_name(site, layer)] = delta.cpu()
                reports.append(
                    LayerReport(
                        site,
                        layer,
                        keys.cpu(),
                        values.cpu(),
                        float((residual.norm(dim=-1) / first[site]).nanmean()),
                        ratio,
                        solution.ridge,
                        solution.relative_error,
                        written,
                    )
                )
            left = self._values(module, goals["ffn"], "ffn", over)[1].norm(dim=-1) / first["ffn"]
        for name, delta in deltas.items():
            self.deltas[name] = self.deltas[name] + delta if name in self.deltas else delta
        self._log_layers(trainer, reports, edit_batch)
        return SpreadReport(
            edit_batch, tuple(edits), tuple(targets), tuple(reports), tuple(left.nan_to_num(0.0).tolist())
        )

    def _solve(
        self, wanted_NO: Tensor, keys_NI: Tensor, place: Place, second_moments: SecondMoments, device: torch.device
    ) -> Solution:
        few = len(keys_NI) <= FEW_EDITS * keys_NI.shape[1]
        if few and self.null_space is None:
            try:
                return solve_with_factor(wanted_NO, keys_NI, second_moments.factor(place), self.lam)
            except FloatingPointError as error:
                log.info("%s: %s; solving without it", place, error)
        moment = second_moments.moment(place).to(device)
        if self.null_space is None:
            return solve_update(wanted_NO, keys_NI, moment, self.lam)
        return solve_in_null_space(wanted_NO, keys_NI, moment, self.lam, self.null_space)

    def _value_site(self, module: TargetOptimizer, site: SiteName) -> SiteName:
        """Where a written site's target and residual are measured (MEMIT: the layer's output)."""
        return site if site in module.sites_optimised else "hidden"

    def _goal(self, module: TargetOptimizer, targets: Sequence[Target], site: SiteName) -> Tensor:
        return stack(targets, self._value_site(module, site)).to(module.device)

    def _values(
        self, module: TargetOptimizer, goal_NO: Tensor, site: SiteName, over: Measurement
    ) -> tuple[Tensor, Tensor]:
        """Current values at the target layer, and what they lack in the residual stream, shape [N, O] each.

        That is V* − value; where the layer norms the value before adding it, norm(V*) − norm(value).
        """
        where = self._value_site(module, site)
        values = collect_values(module.model, module.sites, where, module.target_layer, over)
        goals = goal_NO.to(values.dtype)
        norm = module.sites.norm(where, module.target_layer)
        return values, goals - values if norm is None else norm(goals) - norm(values)

    def _log_layers(self, trainer: L.Trainer, reports: Sequence[LayerReport], edit_batch: int) -> None:
        for report in reports:
            place = f"{report.site}/layer_{report.layer}"
            log.info(
                "edit batch %d: wrote %s, residual before %.3f, |dW|/|W| %.4f, of dW stored %.1f %%",
                edit_batch, place, report.residual, report.norm_ratio, 100 * report.written.kept,
            )  # fmt: skip
            if report.written.rounding > MUCH_ROUNDING:
                log.warning(
                    "%s: rounding to the weight's precision changed dW by %.0f %% of its norm (%.0f %% of the entries "
                    "moved); set --model.keep_float32 true, or load the model with --model.dtype float32",
                    place, 100 * report.written.rounding, 100 * report.written.changed,
                )  # fmt: skip
            for logger in trainer.loggers:
                logger.log_metrics(
                    {
                        f"spread/residual/{place}": report.residual,
                        f"spread/norm_ratio/{place}": report.norm_ratio,
                        f"spread/solve_error/{place}": report.relative_error,
                        f"spread/ridge/{place}": report.ridge,
                        f"spread/kept/{place}": report.written.kept,
                        f"spread/changed/{place}": report.written.changed,
                        f"spread/rounding/{place}": report.written.rounding,
                    },
                    edit_batch,
                )


def _warn_of_overload(module: TargetOptimizer, count: int) -> None:
    """Say so when a batch asks more of the weights than they can hold."""
    width = in_features(module.sites.module("ffn", module.target_layer))
    if count > PUBLISHED_LOAD * width:
        log.warning(
            "%d edits in one edit batch are %.2f of the %d key dimensions (published: up to %.2f): they will "
            "disturb each other; raise --spread.lam, or make --data.edit_batch smaller",
            count, count / width, width, PUBLISHED_LOAD,
        )  # fmt: skip


@contextmanager
def _all_or_nothing(projections: Any) -> Iterator[None]:
    """Put the weights back, bit by bit, if the block does not end well (an interrupt included)."""
    kept: list[tuple[nn.Module, Tensor]] = [(p, p.weight.detach().clone()) for p in projections]
    try:
        yield
        for projection, _ in kept:
            if not projection.weight.isfinite().all():  # type: ignore[operator,union-attr]
                raise FloatingPointError("a written weight is not finite in its own precision")
    except BaseException:
        for projection, weight in kept:
            projection.weight.data.copy_(weight)  # type: ignore[operator,union-attr]
        raise

"""What the write of an edit batch did, layer by layer, and what it left."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

from torch import Tensor

from pmet_lightning.data.records import Edit
from pmet_lightning.model.architectures import SiteName
from pmet_lightning.targets.store import Target

log = logging.getLogger(__name__)

MUCH_ROUNDING = 0.5  # of ‖ΔW‖


@dataclass(frozen=True)
class LayerReport:
    """What one write did; its fields are the names of these figures in the report, in TensorBoard and in JSON.

    Attributes:
        site: Written projection.
        layer: Its layer.
        residual: Mean over edits of ‖E‖, relative to that before the first write; as this write met it. Edits that were
            at their targets already do not count.
        norm_ratio: ‖ΔW‖ / ‖W‖.
        growth: The same of all edit batches so far together, relative to the unedited weight.
        solve_error: Relative error of the linear system.
        ridge: Ridge of the solve, on the diagonal of λC + KKᵀ.
        condition_bound: Lower bound of the condition number, as in :class:`~pmet_lightning.solver.update.Solution`.
        kept: How much of ΔW the stored weight has, as in :class:`~pmet_lightning.model.projections.StoredDelta`; and so
            are the next two.
        changed: Share of the entries that are now different.
        rounding: ‖stored change − ΔW‖ / ‖ΔW‖.
        residual_after: As ``residual``, after this write (and that of the other site in the next layer, if both are
            written).
        overshoot: Mean over edits of how far the residual stream at the target layer has gone past its target after
            this write (:func:`~pmet_lightning.write.residual.overshoot`).
    """

    site: SiteName
    layer: int
    residual: float
    norm_ratio: float
    growth: float
    solve_error: float
    ridge: float
    condition_bound: float
    kept: float
    changed: float
    rounding: float
    residual_after: float = math.nan
    overshoot: float = math.nan

    @property
    def name(self) -> str:
        """Site and layer."""
        return f"{self.site}/layer_{self.layer}"


@dataclass(frozen=True)
class WriteReport:
    """What one edit batch left behind.

    Attributes:
        edit_batch: Its number.
        edits: The edits written.
        targets: Their targets.
        layers: One report for each write, in order.
        residual_left: ‖V* − value‖ after the last write relative to before the first, for each edit; 0 if it
            was there already.
    """

    edit_batch: int
    edits: tuple[Edit, ...]
    targets: tuple[Target, ...]
    layers: tuple[LayerReport, ...]
    residual_left: tuple[float, ...]

    def layer_lines(self) -> list[dict[str, Any]]:
        """Each write as plain numbers, with the number of its edit batch."""
        return [{"edit_batch": self.edit_batch, **asdict(layer)} for layer in self.layers]


class BatchOutputs(TypedDict, total=False):
    """What a training step and the callbacks after it hand on: the ``outputs`` of ``on_train_batch_end``.

    Attributes:
        targets: Of this process' edits, by the module's step.
        written: By the spread; absent if nothing was written, or a limit has taken it back.
        ledger: A line for every edit, measured once on the model just written.
        rows_before: Score rows of the edits before they were written; of a stream.
        rows_at_once: The same right after; where there are several edit batches.
    """

    targets: list[Target]
    written: WriteReport
    ledger: list[dict[str, Any]]
    rows_before: Tensor
    rows_at_once: Tensor


def add_outcomes(
    reports: Sequence[LayerReport], left: Mapping[SiteName, float], overshoots: Sequence[float]
) -> tuple[LayerReport, ...]:
    """The reports with what was measured after each write, which is what was measured before the next one.

    Args:
        reports: In the order of writing.
        left: The mean residual of each site after the last write.
        overshoots: The mean overshoot after each write.
    """
    done: list[LayerReport] = []
    left = dict(left)
    for report, beyond in zip(reversed(reports), reversed(overshoots), strict=True):
        done.append(replace(report, residual_after=left[report.site], overshoot=beyond))
        left[report.site] = report.residual
    return tuple(reversed(done))


def log_writes(reports: Sequence[LayerReport], edit_batch: int) -> None:
    """Say what was written, and warn where precision was lost."""
    for report in reports:
        log.info(
            "edit batch %d: wrote %s, residual %.3f, then %.3f, overshoot %+.2f, |dW|/|W| %.4f, of dW stored %.1f %%",
            edit_batch, report.name, report.residual, report.residual_after, report.overshoot, report.norm_ratio,
            100 * report.kept,
        )  # fmt: skip
        if report.rounding > MUCH_ROUNDING:
            log.warning(
                "%s: rounding to the weight's precision changed dW by %.0f %% of its norm (%.0f %% of the entries "
                "moved); set --model.keep_float32 true, or load the model with --model.dtype float32",
                report.name, 100 * report.rounding, 100 * report.changed,
            )  # fmt: skip

"""What the write of an edit batch did, layer by layer, and the residual that it left."""

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
_NEARLY_ALL = 0.999  # of ΔW: what float32 stores is not worth a word


@dataclass(frozen=True)
class LayerReport:
    """What one write did; the names of its fields are used in the report, in TensorBoard and in JSON.

    Attributes:
        site: The written site.
        layer: Its layer.
        residual: Mean over edits of ‖E‖ before this write, relative to that before the first write. Edits that were at
            their targets already do not count. With successive targets E is that of the layer's own, and so 1 here.
        norm_ratio: ‖ΔW‖ / ‖W‖.
        growth: Norm of the total ΔW of all edit batches so far, relative to that of the unedited weight.
        lam: λ of the solve.
        solve_error: Relative error of the linear system.
        ridge: Ridge of the solve, on the diagonal of λC + KKᵀ.
        condition_bound: Lower bound of the condition number, as in :class:`~pmet_lightning.solver.update.Solution`.
        kept: How much of ΔW the stored weight has; this and the next two are those of
            :class:`~pmet_lightning.model.projections.StoredDelta`.
        changed: Share of the entries that have changed.
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
    lam: float
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
    """What the write of one edit batch has done.

    Attributes:
        edit_batch: Its number.
        edits: The edits written.
        targets: Their targets.
        layers: One report for each write, in order.
        residual_left: ‖V* − value‖ after the last write relative to before the first, for each edit; 0 if it
            was at its target already.
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
    """What a training step and the callbacks after it pass on: the ``outputs`` of ``on_train_batch_end``.

    Attributes:
        targets: Targets of this process's edits, from the module's step.
        written: Report of the write; absent if nothing was written, or if it was taken back because of a limit.
        ledger: A line for every edit, measured once on the model just written.
        rows_before: Score rows of the edits before they were written; for a stream.
        rows_at_once: Score rows of the edits right after they were written; if there are several edit batches.
        answers: Answers to the questions of the edits right before and right after they were written; for a stream.
    """

    targets: list[Target]
    written: WriteReport
    ledger: list[dict[str, Any]]
    rows_before: Tensor
    rows_at_once: Tensor
    answers: list[dict[str, Any]]


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
    for report, past in zip(reversed(reports), reversed(overshoots), strict=True):
        done.append(replace(report, residual_after=left[report.site], overshoot=past))
        left[report.site] = report.residual
    return tuple(reversed(done))


def log_writes(reports: Sequence[LayerReport], edit_batch: int) -> None:
    """Log what was written, a line for the edit batch, and warn where precision was lost."""
    last = {report.site: report for report in reports}
    left = ", ".join(f"the {site} outputs are {100 * report.residual_after:.0f} %" for site, report in last.items())
    kept = min(report.kept for report in reports)
    log.info(
        "edit batch %d is written: %s as far from their targets as before%s", edit_batch, left,
        f"; the stored weights have {100 * kept:.1f} % of the change or more" if kept < _NEARLY_ALL else "",
    )  # fmt: skip
    for report in reports:
        if report.rounding > MUCH_ROUNDING:
            log.warning(
                "%s: rounding to the weight's precision changed dW by %.0f %% of its norm (%.0f %% of the entries "
                "changed); set --model.keep_float32 true, or load the model with --model.dtype float32",
                report.name, 100 * report.rounding, 100 * report.changed,
            )  # fmt: skip

"""What the write of an edit batch did, layer by layer, and what it left."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pmet_lightning.data.records import Edit
from pmet_lightning.model.architectures import SiteName
from pmet_lightning.model.projections import Written
from pmet_lightning.targets.store import Target

log = logging.getLogger(__name__)

MUCH_ROUNDING = 0.5  # of ‖ΔW‖


@dataclass(frozen=True)
class LayerReport:
    """What one write did.

    Attributes:
        site: Written projection.
        layer: Its layer.
        residual: Mean over edits of ‖E‖, relative to that before the first write; as this write met it. Edits that were
            at their targets already do not count.
        norm_ratio: ‖ΔW‖ / ‖W‖.
        growth: The same of all edit batches so far together, relative to the unedited weight.
        ridge: Ridge of the solve, on the diagonal of λC + KKᵀ.
        relative_error: Relative error of the linear system.
        condition_bound: Lower bound of the condition number, as in :class:`~pmet_lightning.solver.update.Solution`.
        written: How much of ΔW the stored weight has.
        residual_after: As ``residual``, behind this write (and that of the other site in the next layer, if both are
            written).
        overshoot: Mean over edits of how far the residual stream at the target layer has gone past its target behind
            this write (:func:`~pmet_lightning.write.residual.overshoot`).
    """

    site: SiteName
    layer: int
    residual: float
    norm_ratio: float
    growth: float
    ridge: float
    relative_error: float
    condition_bound: float
    written: Written
    residual_after: float = math.nan
    overshoot: float = math.nan


@dataclass(frozen=True)
class SpreadReport:
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


def with_outcomes(
    reports: Sequence[LayerReport], left: Mapping[SiteName, float], overshoots: Sequence[float]
) -> tuple[LayerReport, ...]:
    """The reports with what was measured behind each write, which is what was measured before the next one.

    Args:
        reports: In the order of writing.
        left: The mean residual of each site behind the last write.
        overshoots: The mean overshoot behind each write.
    """
    done: list[LayerReport] = []
    left = dict(left)
    for report, beyond in zip(reversed(reports), reversed(overshoots), strict=True):
        done.append(replace(report, residual_after=left[report.site], overshoot=beyond))
        left[report.site] = report.residual
    return tuple(reversed(done))


def tell(reports: Sequence[LayerReport], edit_batch: int) -> None:
    """Say what was written, and warn where precision was lost."""
    for report in reports:
        place = f"{report.site}/layer_{report.layer}"
        log.info(
            "edit batch %d: wrote %s, residual %.3f, then %.3f, overshoot %+.2f, |dW|/|W| %.4f, of dW stored %.1f %%",
            edit_batch, place, report.residual, report.residual_after, report.overshoot, report.norm_ratio,
            100 * report.written.kept,
        )  # fmt: skip
        if report.written.rounding > MUCH_ROUNDING:
            log.warning(
                "%s: rounding to the weight's precision changed dW by %.0f %% of its norm (%.0f %% of the entries "
                "moved); set --model.keep_float32 true, or load the model with --model.dtype float32",
                place, 100 * report.written.rounding, 100 * report.written.changed,
            )  # fmt: skip

"""What the writes of one edit batch share, and what some of them are written towards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pmet_lightning.data.token_rows import TokenRow
from pmet_lightning.model.architectures import ProjectionId, SiteName
from pmet_lightning.moments.second_moments import SecondMoments
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.distributed import ProcessGroup
from pmet_lightning.write.edited_weights import Draft
from pmet_lightning.write.keys import KeyRows
from pmet_lightning.write.residual import SiteTarget


@dataclass(frozen=True)
class WriteState:
    """An edit batch while it is written.

    Attributes:
        module: The module with the model.
        second_moments: Where C comes from.
        processes: The processes of the run.
        count: N, the edits of all processes.
        draft: What has been written of it.
        kept: Positions of the facts of earlier edit batches that this one does not correct.
        protected: Those of them whose keys get no new value.
        past_keys: Keys of the facts of earlier edit batches, if they are protected, on the first process.
        prompts: Rows of this process whose tokens after the subject are preserved.
        rows: Rows of this process in which keys and values are measured.
    """

    module: TargetOptimizer
    second_moments: SecondMoments
    processes: ProcessGroup
    count: int
    draft: Draft
    kept: Sequence[int]
    protected: Sequence[int]
    past_keys: Mapping[ProjectionId, Tensor]
    prompts: Sequence[TokenRow]
    rows: KeyRows


@dataclass(frozen=True)
class Aims:
    """What some projections are written towards.

    Attributes:
        goals: The target of each.
        last: For each site, its target in the last of their layers, which the residuals are compared with.
        stream: What leaves that layer.
    """

    goals: Mapping[ProjectionId, SiteTarget]
    last: Mapping[SiteName, SiteTarget]
    stream: ProjectionId

"""The stages of a search in Optuna's storage: what was tried is kept, and a stopped search goes on where it was."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmet_lightning.targets.construction import Construction
from pmet_lightning.targets.target_optimizer import OptimizedSites
from pmet_lightning.tune.space import CLAMPS, CONSTRUCTIONS, OPTIMIZED, PENALTIES, STRIDES, TargetSetting, rounded

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

Objective = Callable[["Trial"], float]

REDUCTION = 3  # one trial in so many goes on to so many times as many edits
_WAITS = (1, 2, 3)  # seconds between attempts to open a database
_HEARTBEAT, _GRACE = 60, 300  # seconds, of a storage that several machines share
_STARTUP = 8  # trials before the sampler has enough to learn from


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """Optuna's storage.

    Args:
        url: A database that several processes or machines share; ``None`` takes a SQLite file.
        folder: Folder of the file.
    """
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import RDBStorage

    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
        return RDBStorage(f"sqlite:///{folder / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 60}})
    from sqlalchemy.exc import DatabaseError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of the heartbeat
        for seconds in _WAITS:
            try:
                return RDBStorage(url, heartbeat_interval=_HEARTBEAT, grace_period=_GRACE)
            except DatabaseError:  # another process makes the tables of a new database at this moment
                time.sleep(seconds)
        return RDBStorage(url, heartbeat_interval=_HEARTBEAT, grace_period=_GRACE)


class Stage:
    """The trials of one stage.

    Args:
        storage: Where they are kept.
        name: Name of its study.
        alone: Whether no other process works on it: trials that still run are then of a process that was killed.
        seed: Seed of the sampler.
        pruner: Stops bad trials; ``None`` stops none.
        sampler: Makes the sampler for a seed; by default :func:`tpe`.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        alone: bool,
        seed: int = 0,
        pruner: BasePruner | None = None,
        sampler: Callable[[int], BaseSampler] | None = None,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize",
            load_if_exists=True,
            pruner=pruner or optuna.pruners.NopPruner(),
        )
        self.seed, self._sampler = seed, sampler or tpe
        if alone:
            self._fail_killed()

    def _fail_killed(self) -> None:
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)

    def finished(self, pruned: bool = True) -> list[FrozenTrial]:
        """The trials that came to an end.

        Args:
            pruned: Whether those count that were stopped early.
        """
        from optuna.trial import TrialState

        states = (TrialState.COMPLETE, *((TrialState.PRUNED,) if pruned else ()))
        return list(self.study.get_trials(deepcopy=False, states=states))

    @property
    def count(self) -> int:
        """Number of trials, with those that run now elsewhere, without those that failed."""
        from optuna.trial import TrialState

        return sum(trial.state != TrialState.FAIL for trial in self.study.get_trials(deepcopy=False))

    @property
    def seconds(self) -> float:
        """How long the finished trials took, in all."""
        return sum(trial.duration.total_seconds() for trial in self.finished() if trial.duration is not None)

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        """A value that is made once for a search, whoever asks for it again."""
        if name not in self.study.user_attrs:
            self.study.set_user_attr(name, make())
        return self.study.user_attrs[name]

    def run(self, objective: Objective, parameters: Mapping[str, Any] | None = None) -> FrozenTrial:
        """Run one trial.

        Its sampler is seeded by the number of trials before it, so that a search that was stopped goes on as it would
        have.

        Args:
            objective: Returns the value of a trial.
            parameters: Its parameters, where they are not left to the sampler.
        """
        sampler = self._sampler(self.seed * 100_003 + self.count)
        # Not Optuna's queue: of two processes on one SQLite file, both may take the same trial from it.
        self.study.sampler = sampler if parameters is None else fixed(parameters, sampler)
        numbers: list[int] = []
        self.study.optimize(objective, n_trials=1, callbacks=[lambda _, trial: numbers.append(trial.number)])
        return self.study.trials[numbers[0]]


def tpe(seed: int) -> BaseSampler:
    """Optuna's tree-structured Parzen estimator over all parameters together."""
    from optuna.samplers import TPESampler

    return TPESampler(n_startup_trials=_STARTUP, multivariate=True, constant_liar=True, seed=seed)


def fixed(parameters: Mapping[str, Any], sampler: BaseSampler) -> BaseSampler:
    """A sampler that gives parameters as they are, and leaves others to another sampler."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import PartialFixedSampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return PartialFixedSampler(dict(parameters), sampler)


def halving(first: int) -> BasePruner:
    """Successive halving, with the number of edits as the resource.

    Args:
        first: Edits of the first rung.
    """
    from optuna.pruners import SuccessiveHalvingPruner

    return SuccessiveHalvingPruner(min_resource=first, reduction_factor=REDUCTION)


def suggest(
    trial: Trial,
    layers: Sequence[int],
    optimize: Sequence[OptimizedSites] = OPTIMIZED,
    targets: Sequence[Construction] = CONSTRUCTIONS,
) -> TargetSetting:
    """How a trial finds its targets.

    Args:
        trial: The trial.
        layers: The layers that may get a delta.
        optimize: What may get one.
        targets: Where the targets of the edited layers may come from.
    """
    return TargetSetting(
        layer=trial.suggest_categorical("layer", list(layers)),
        optimize=trial.suggest_categorical("optimize", list(optimize)),
        clamp=rounded(trial.suggest_float("clamp", *CLAMPS, log=True)),
        stride=rounded(trial.suggest_float("stride", *STRIDES, log=True)),
        penalties=trial.suggest_categorical("penalties", list(PENALTIES)),
        targets=trial.suggest_categorical("targets", list(targets)),
    )


def parameters_of(target: TargetSetting) -> dict[str, Any]:
    """The parameters that :func:`suggest` makes such a setting of."""
    return vars(target)

"""The search in three stages: which layers, which settings, and which of the best few with as many edits as wanted."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from pmet_lightning.data.records import Edit
from pmet_lightning.evaluation.scores import CORE
from pmet_lightning.tune.bench import Bench, with_few_neighbors
from pmet_lightning.tune.budget import LARGE_RUNG, PROBES, Budget, rungs_of
from pmet_lightning.tune.choice import best_of, choose, search_writes
from pmet_lightning.tune.facts import Facts
from pmet_lightning.tune.outcome import Outcome, packed, unpacked
from pmet_lightning.tune.space import (
    DIRECTIONS,
    Setting,
    TargetSetting,
    WriteSetting,
    directions_of,
    edited_layers,
    target_layers,
    widths_at,
)
from pmet_lightning.tune.study import Stage, halving, parameters_of, suggest

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import Trial

log = logging.getLogger(__name__)

FEW = 24  # edits that layers are looked at with
MOST_EDITS = 200  # in an edit batch, if the number is left to the search
MOST_BATCHES = 2  # edit batches that a finalist writes
KEPT_LAYERS = 4
FINALISTS = 4
MOST_FINALISTS = 8
LAYER_SHARE, FINAL_SHARE = 0.3, 0.3  # of the time: at most for the layers, and about that for the finalists
WHOLE_SHARE = 0.2  # of the time: what a trial with all edits may take, estimated too high from few
_PROBE_LAMS = (0, 2)
_PARTS = ("write", "questions")
_NOT_FINITE = "no setting gives finite numbers; load the model in another precision (--model.dtype float32)"


@dataclass(frozen=True)
class Finalist:
    """A setting that was measured with as many edits as wanted.

    Attributes:
        setting: The setting.
        outcome: What it does to the tuning records.
    """

    setting: Setting
    outcome: Outcome


class Search:
    """A search that is stored as it goes.

    Args:
        bench: The model.
        facts: Facts to tune on and to report.
        budget: How much it may take.
        storage: Where it is stored.
        name: Name of the search in the storage.
        seed: Seed of its choices.
        alone: Whether no other process works on it.

    Attributes:
        scale: The units of the model.
        notices: What to know about the result.

    Raises:
        MomentError: If there is no memory for the second moments.
        CorpusError: If the corpus has no text.
    """

    def __init__(
        self,
        bench: Bench,
        facts: Facts,
        budget: Budget,
        storage: BaseStorage,
        name: str,
        seed: int = 0,
        alone: bool = True,
    ) -> None:
        self.bench, self.facts, self.budget = bench, facts, budget
        self.editable = edited_layers(bench.depth, bench.layers)
        self.scale = bench.prepare(self.editable, facts.tuning_edits[:FEW])
        self.few = [with_few_neighbors(edit) for edit in facts.tuning_edits]
        self.depths = target_layers(bench.depth, bench.layers, budget.first)
        self.notices: list[str] = []
        stage = partial(Stage, storage, alone=alone, seed=seed)
        self.by_layer = stage(name=f"{name}, layers")
        self.by_setting = stage(name=f"{name}, settings")
        self.final = stage(name=f"{name}, finalists")

    @property
    def counts(self) -> dict[str, int]:
        """Number of finished trials of each stage."""
        return {name: len(stage.finished()) for name, stage in self._stages.items()}

    @property
    def _stages(self) -> dict[str, Stage]:
        return {"layers": self.by_layer, "settings": self.by_setting, "finalists": self.final}

    def run(self) -> tuple[Finalist, list[Finalist], int]:
        """Search.

        Returns:
            The chosen one, all that it was chosen from, and how many of them, the first ones, cannot be told from the
            best one.

        Raises:
            ValueError: If no setting gives finite numbers.
        """
        self._look_at_layers()
        if not self.by_layer.finished(pruned=False):
            raise ValueError(_NOT_FINITE)
        self.edits = int(self.by_setting.remember("edits", self._affordable_edits))
        self.layers = list(self.by_setting.remember("layers", self._best_layers))
        self._notice_edits()
        log.info("targets in layer %s; %d edits in an edit batch", " or ".join(map(str, self.layers)), self.edits)
        self.rungs = list(self.by_setting.remember("rungs", self._affordable_rungs))
        self.by_setting.study.pruner = halving(self.rungs[0])
        self._try_settings()
        self._measure_finalists()
        return self._choose()

    @property
    def timed(self) -> bool:
        """Whether time limits the search, and not a number of trials."""
        return self.budget.trials is None

    @property
    def spent(self) -> float:
        """Seconds of all finished trials, also of those before the search was stopped."""
        return sum(stage.seconds for stage in self._stages.values())

    def _left(self, share: float) -> bool:
        """Whether less than a share of the time is spent."""
        return not self.timed or self.spent < share * self.budget.seconds

    # ---- which layers ----------------------------------------------------------------------------------

    def _look_at_layers(self) -> None:
        """Write few edits from targets in each layer, into several numbers of layers below it."""
        points = [(layer, probe) for layer in self.depths for probe in range(len(self.budget.probes))]
        done = {(trial.params["layer"], trial.params["probe"]) for trial in self.by_layer.finished()}
        for layer, probe in points:
            if (layer, probe) in done:
                continue
            if done and not self._left(LAYER_SHARE):
                skipped = sorted(set(self.depths) - {layer for layer, _ in done})
                if skipped:
                    self.notices.append(f"there was no time to look at targets in the layers {skipped}")
                break
            trial = self.by_layer.run(self._probe, {"layer": layer, "probe": probe})
            done.add((layer, probe))
            log.info(
                "targets in layer %d of %d: Score %.1f with %d edits",
                layer, self.bench.depth, trial.value or 0.0, self._few_count,
            )  # fmt: skip

    @property
    def _few_count(self) -> int:
        return min(FEW, len(self.few), self.budget.edits or FEW)

    def _probe(self, trial: Trial) -> float:
        layer = trial.suggest_int("layer", 0, self.bench.depth - 1)
        probe = self.budget.probes[trial.suggest_int("probe", 0, len(PROBES) - 1)]
        target = replace(probe, layer=layer)
        writes = [WriteSetting(width, lam_step=lam) for width in self._widths(target) for lam in _PROBE_LAMS]
        batches = [self.few[: self._few_count]]
        seen = {write: self._measure(trial, target, write, batches) for write in writes}
        best = best_of(seen)
        trial.set_user_attr("setting", Setting(target, best).plain())
        return seen[best].score

    def _widths(self, target: TargetSetting) -> list[int]:
        return widths_at(target, self.editable)

    def _best_layers(self) -> list[int]:
        """The layers with the highest Scores."""
        best: dict[int, float] = {}
        for trial in self.by_layer.finished(pruned=False):
            best[trial.params["layer"]] = max(best.get(trial.params["layer"], -math.inf), trial.value or 0.0)
        return sorted(sorted(best, key=lambda layer: -best[layer])[:KEPT_LAYERS])

    # ---- how many edits --------------------------------------------------------------------------------

    def _affordable_edits(self) -> int:
        """Edits in an edit batch: as wanted, or as many as there are records and, by the first stage, time."""
        least = min(len(self.few), len(self.facts.reporting_edits))
        if self.budget.edits is not None:
            return min(self.budget.edits, least)
        most = min(MOST_EDITS, least)
        if not self.timed:
            return most
        affordable = int(FINAL_SHARE * self.budget.seconds / 2 / self._seconds_per_edit())
        return max(min(LARGE_RUNG, most), min(affordable, most))

    def _affordable_rungs(self) -> list[int]:
        """Up to all edits of an edit batch, unless a trial with as many would take too much of the time."""
        taken = self._seconds_per_edit() * self.edits
        return rungs_of(self.edits, not self.timed or taken < WHOLE_SHARE * self.budget.seconds)

    def _notice_edits(self) -> None:
        """Say so if there are fewer edits in an edit batch than wanted, or than there could be."""
        wanted = self.budget.edits or min(MOST_EDITS, len(self.few), len(self.facts.reporting_edits))
        if self.edits < wanted:
            reason = "there are no more records" if self.budget.edits else "time allows no more"
            self.notices.append(f"settings are for {self.edits} edits in an edit batch: {reason}")

    def _seconds_per_edit(self) -> float:
        """Of a finalist, by the trials of the first stage: one search for targets, and about five writes."""
        trials = [trial.user_attrs["writes"] for trial in self.by_layer.finished(pruned=False)]
        rows = [row for trial in trials for row in trial]
        targets = median(max(row["seconds"]["targets"] / row["edits"] for row in trial) for trial in trials)
        write, questions = (median(row["seconds"][name] / row["edits"] for row in rows) for name in _PARTS)
        return targets + 5 * (write + 2 * questions)

    # ---- which settings --------------------------------------------------------------------------------

    def _try_settings(self) -> None:
        """Trials with more and more edits, of which bad ones are stopped."""
        starts = self._starts()
        while self._more_trials():
            number = self.by_setting.count
            trial = self.by_setting.run(self._try, starts[number] if number < len(starts) else None)
            best = max((t.value for t in self.by_setting.finished(pruned=False)), default=math.nan)
            reached = max(trial.intermediate_values, default=0)
            log.info(
                "trial %d: Score %.1f with %d edits; the best so far %.1f with %d; %s",
                number + 1, trial.value or 0.0, reached, best, self.rungs[-1], self._time_line(),
            )  # fmt: skip

    def _time_line(self) -> str:
        return f"{self.spent / 60:.0f} min" + (f" of {self.budget.seconds / 60:.0f}" if self.timed else "")

    def _more_trials(self) -> bool:
        if self.budget.trials is not None:
            return len(self.by_setting.finished()) < self.budget.trials
        return self._left(1 - FINAL_SHARE) or not self.by_setting.finished(pruned=False)

    def _starts(self) -> list[dict[str, Any]]:
        """Where the second stage begins: with the better of what was tried in each of the layers that are left."""
        return [parameters_of(self._known(layer).target) for layer in self.layers]

    def _known(self, layer: int) -> Setting:
        """The best setting so far with targets in a layer."""
        for trials in (self.by_setting.finished(pruned=False), self.by_layer.finished(pruned=False)):
            own = [trial for trial in trials if trial.params["layer"] == layer]
            if own:
                return Setting.of(max(own, key=lambda trial: trial.value or 0.0).user_attrs["setting"])
        target = TargetSetting(layer, targets=self.budget.targets[0])
        return Setting(target, WriteSetting(self._widths(target)[-1]))

    def _try(self, trial: Trial) -> float:
        from optuna import TrialPruned

        target = suggest(trial, self.layers, self.budget.optimize, self.budget.targets)
        widths, value = self._widths(target), 0.0
        known = self._known(target.layer).write
        write = replace(known, width=min(widths, key=lambda width: abs(width - known.width)))
        for count in self.rungs:
            measure = partial(self._measure, trial, target, batches=[self.few[:count]])
            directions = directions_of(target) if count == self.rungs[-1] else DIRECTIONS[:1]
            seen = search_writes(measure, write, widths, directions)
            write = best_of(seen)
            value = seen[write].score
            trial.set_user_attr("setting", Setting(target, write).plain())
            trial.report(value, count)
            if count != self.rungs[-1] and trial.should_prune():
                raise TrialPruned
        return value

    # ---- the best few ----------------------------------------------------------------------------------

    def _measure_finalists(self) -> None:
        """The best settings with as many edits as wanted, and all of their questions."""
        done = {trial.params["of"] for trial in self.final.finished()}
        most = MOST_FINALISTS if self.timed else FINALISTS
        for number, of in enumerate(self._best_trials(most)):
            longest = self.final.seconds / max(1, len(done))
            if of in done:
                continue
            if self.timed and number and done and self.spent + 1.5 * longest > self.budget.seconds:
                break
            trial = self.final.run(self._measure_finalist, {"of": of})
            done.add(of)
            log.info(
                "finalist %d: Score %.1f with %d edits; %s",
                number + 1,
                trial.value or 0.0,
                self.edits,
                self._time_line(),
            )

    def _best_trials(self, most: int) -> list[int]:
        """Numbers of the best trials with different settings, best first."""
        best = sorted(self.by_setting.finished(pruned=False), key=lambda trial: (-(trial.value or 0.0), trial.number))
        different = {Setting.of(trial.user_attrs["setting"]).target: trial.number for trial in reversed(best)}
        return [trial.number for trial in best if trial.number in different.values()][:most]

    def _measure_finalist(self, trial: Trial) -> float:
        of = trial.suggest_int("of", 0, 1_000_000)
        setting = Setting.of(self.by_setting.study.trials[of].user_attrs["setting"])
        measure = partial(self._measure, trial, setting.target, batches=self._batches())
        seen = search_writes(measure, setting.write, self._widths(setting.target), DIRECTIONS[:1])
        write, _ = choose(seen, lambda one: (-self.scale.lam(one),))
        trial.set_user_attr("setting", Setting(setting.target, write).plain())
        trial.set_user_attr("outcome", packed(seen[write]))
        return seen[write].score

    def _batches(self) -> list[list[Edit]]:
        """Edit batches of tuning records with all of their questions."""
        edits = self.facts.tuning_edits
        count = max(1, min(MOST_BATCHES, len(edits) // self.edits))
        return [edits[i * self.edits : (i + 1) * self.edits] for i in range(count)]

    def _choose(self) -> tuple[Finalist, list[Finalist], int]:
        found = {
            Setting.of(trial.user_attrs["setting"]): unpacked(trial.user_attrs["outcome"])
            for trial in self.final.finished(pruned=False)
        }
        if not found:
            raise ValueError(_NOT_FINITE)
        chosen, equal = choose(found, lambda one: (one.target.clamp, -self.scale.lam(one.write)))
        others = sorted(set(found) - set(equal), key=lambda one: -found[one].score)
        finalists = [Finalist(one, found[one]) for one in [*equal, *others]]
        return Finalist(chosen, found[chosen]), finalists, len(equal)

    def _measure(
        self, trial: Trial, target: TargetSetting, write: WriteSetting, batches: Sequence[Sequence[Edit]]
    ) -> Outcome:
        """Measure one setting, and keep what it does with the trial."""
        from optuna import TrialPruned

        setting = Setting(target, write)
        try:
            outcome = self.bench.measure(self.scale.sections(setting), batches)
        except FloatingPointError as error:
            log.info("%s: %s", setting, error)
            raise TrialPruned from error
        rows = [*trial.user_attrs.get("writes", []), self._row(setting, outcome, len(batches[0]))]
        trial.set_user_attr("writes", rows)
        return outcome

    def _row(self, setting: Setting, outcome: Outcome, edits: int) -> dict[str, Any]:
        """A measured setting as plain numbers."""
        return {
            "edits": edits,
            "layers": setting.layers,
            **{name: value for name, value in asdict(setting.target).items() if name != "layer"},
            "lr": self.scale.learning_rate(setting.target),
            "rule": setting.write.rule,
            "lam": self.scale.lam(setting.write),
            "score": outcome.score,
            **{name: outcome.scores.get(name) for name in CORE},
            "kl": outcome.damage,
            "growth": outcome.growth,
            "found": outcome.found,
            "seconds": {name: round(value, 3) for name, value in outcome.seconds.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """All that was measured, in order, with its stage and the number of its trial."""
        return [
            {"stage": name, "trial": trial.number, "state": trial.state.name.lower(), **row}
            for name, stage in self._stages.items()
            for trial in stage.finished()
            for row in trial.user_attrs.get("writes", [])
        ]

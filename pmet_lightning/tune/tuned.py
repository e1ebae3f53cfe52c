"""What a search has found: the chosen settings, what they do to records of other subjects, what to know about it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmet_lightning.evaluation.verdict import damage_line, damage_of
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.run.settings import read_sections
from pmet_lightning.tune.bench import Bench
from pmet_lightning.tune.budget import Budget
from pmet_lightning.tune.choice import at_the_edge
from pmet_lightning.tune.facts import Facts
from pmet_lightning.tune.outcome import Outcome
from pmet_lightning.tune.search import Finalist, Search
from pmet_lightning.tune.space import CLAMPS, STRIDES, Setting
from pmet_lightning.tune.study import open_storage
from pmet_lightning.utils.files import write_json

log = logging.getLogger(__name__)

FOUND = 0.7  # mean P(o*) at the end of the search for targets: below it, hardly a target was found
EFFICACY = 70.0
UNTUNED = "your-model.yaml"
_CHOSEN = {
    "model": ("layers", "optimize", "optimizer", "clamp", "kl_factor", "norm_factor", "steps"),
    "spread": ("lam", "rule", "targets", "max_change"),
}
_NEAR = 1.1  # of a bound


@dataclass(frozen=True)
class Tuned:
    """The result of a search.

    Attributes:
        model: Name of the model.
        setting: The chosen settings.
        sections: The same as a configuration has them.
        edits: Edits in an edit batch.
        tuning: What they do to the tuning records.
        reporting: What they do to the reporting records, which nothing was chosen on.
        untuned: What settings do to them that were not sought for this model (:data:`UNTUNED`).
        finalists: The settings that were measured with as many edits, the chosen one's equals first.
        equal: How many of them cannot be told from the best one.
        rows: All that was measured.
        facts: The records.
        notices: What to know before they are used.
        seconds: How long all took, with the time before a search was stopped.
        seed: Seed of the search.
        trials: Number of trials of each stage.
    """

    model: str
    setting: Setting
    sections: Mapping[str, Mapping[str, Any]]
    edits: int
    tuning: Outcome
    reporting: Outcome
    untuned: Outcome
    finalists: Sequence[Finalist]
    equal: int
    rows: Sequence[Mapping[str, Any]]
    facts: Facts
    notices: Sequence[str]
    seconds: float
    seed: int
    trials: Mapping[str, int]

    def editor_settings(self) -> dict[str, Any]:
        """The keyword arguments of :class:`~pmet_lightning.Editor` that they are."""
        model, spread = dict(self.sections["model"]), dict(self.sections["spread"])
        optimizer = model.pop("optimizer")
        return {
            **model,
            "lr": optimizer["init_args"]["lr"],
            "lam": spread.pop("lam"),
            "moments": dict(self.sections["moments"]),
            "spread": spread,
        }


def run_search(
    bench: Bench, facts: Facts, budget: Budget, folder: Path, seed: int = 0, url: str | None = None
) -> Tuned:
    """Search, choose, and measure what was chosen on the reporting records.

    Args:
        bench: The model.
        facts: The records.
        budget: How much the search may take.
        folder: Folder of what is kept.
        seed: Seed of the search.
        url: A database that several processes share; ``None`` takes a file in the folder.

    Raises:
        FileExistsError: If the folder holds another search.
    """
    name = search_name(bench, facts, budget, seed)
    check_folder(folder, name)
    search = Search(bench, facts, budget, open_storage(url, folder), name, seed, alone=url is None)
    chosen, finalists, equal = search.run()
    shared = {name: bench.base.get(name, {}) for name in ("model", "moments", "spread", "drift")}
    shared["model"] = {key: value for key, value in shared["model"].items() if key != "targets_folder"}
    found = search.scale.sections(chosen.setting)
    sections = {name: {**settings, **found.get(name, {})} for name, settings in shared.items()}
    log.info("the chosen settings on %d records of other subjects", search.edits)
    reporting = [facts.reporting_edits[: search.edits]]
    reported = bench.measure(found, reporting, full=True)
    return Tuned(
        bench.name,
        chosen.setting,
        sections,
        search.edits,
        chosen.outcome,
        reported,
        bench.measure(untuned_sections(), reporting),
        finalists,
        equal,
        search.rows(),
        facts,
        [*search.notices, *_notices(search, chosen), *damage_notices(reported)],
        search.spent,
        seed,
        search.counts,
    )


def untuned_sections() -> dict[str, dict[str, Any]]:
    """What a search chooses, as the configuration for any model has it, with layers by depth alone."""
    found = read_sections(UNTUNED)
    return {section: {name: found[section][name] for name in names} for section, names in _CHOSEN.items()}


def _notices(search: Search, chosen: Finalist) -> list[str]:
    """What the numbers warn of."""
    found = max((row["found"] for row in search.rows()), default=0.0)
    efficacy = chosen.outcome.scores["efficacy"]
    notices = []
    if found < FOUND or efficacy < EFFICACY:
        notices.append(
            f"this method will not do well on this model: the best settings write {efficacy:.0f} % of the tuning "
            f"facts, and the search for targets reaches P(o*) {found:.2f} at most. It writes what the model recalls at "
            "the subject's last token; models that recall facts elsewhere, such as at the prompt's last token, do not "
            "take that. 'analyze' shows where this one keeps them"
        )
    target = chosen.setting.target
    for what, value, bounds in (("clamp", target.clamp, CLAMPS), ("learning rate", target.stride, STRIDES)):
        if value < _NEAR * bounds[0] or value > bounds[1] / _NEAR:
            notices.append(f"the {what} is at the end of what was searched; a value beyond may be better")
    if at_the_edge(chosen.setting.write):
        notices.append("λ is at the end of what was searched; a value beyond may be better")
    return notices


def damage_notices(reported: Outcome) -> list[str]:
    """What unrelated text warns of: no trial looks at it, and so a search can choose settings that ruin the model."""
    damage = damage_of({"before": reported.before, "after": reported.scores})
    return [] if damage.level in ("none", "not measured") else [damage_line(damage)]


def search_name(bench: Bench, facts: Facts, budget: Budget, seed: int) -> str:
    """Name of a search: the hash of what its answer depends on besides time or trials."""
    identities = [edit.identity() for edit in (*facts.tuning_edits, *facts.reporting_edits)]
    base = {**bench.base, "model": {**bench.base["model"], "targets_folder": None}}
    wanted = [budget.edits, list(budget.optimize), list(budget.targets), list(budget.first), seed]
    depends = [fingerprint(bench.model), identities, base, *wanted]
    described = json.dumps(depends, sort_keys=True, default=str)
    return f"tune {hashlib.sha256(described.encode()).hexdigest()[:12]}"


def check_folder(folder: Path, name: str) -> None:
    """Refuse a folder with another search, and mark it as this one's.

    Raises:
        FileExistsError: If it holds another one.
    """
    path = folder / "search.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8")).get("name")
        if found != name:
            raise FileExistsError(
                f"{folder} holds a search with another model, other facts, edits, seed or options; take another folder "
                "(--out), or remove it"
            )
    write_json(path, {"name": name})

"""What a search is made of: its space, its facts, the choice among what was measured, and its trials in storage."""

from __future__ import annotations

import math
from dataclasses import replace

import optuna
import pytest
import torch

from pmet_lightning.data.fields import RecordError
from pmet_lightning.data.readers import read_edits
from pmet_lightning.data.records import Edit, Probe
from pmet_lightning.evaluation.scores import CORE, NAMES, table_of
from pmet_lightning.tune.bench import entry_size, with_few_neighbors
from pmet_lightning.tune.budget import LARGE_RUNG, PROBES, Budget, rungs_of
from pmet_lightning.tune.choice import TIE, best_of, choose, is_tie, search_writes
from pmet_lightning.tune.facts import LEAST, Item, asks_about_neighbors, own_facts, read_items, with_bystanders
from pmet_lightning.tune.figures import frontier, positions
from pmet_lightning.tune.outcome import Outcome, join, packed, unpacked
from pmet_lightning.tune.space import (
    LAM_STEPS,
    Scale,
    Setting,
    TargetSetting,
    WriteSetting,
    directions_of,
    target_layers,
    widths_at,
    write_neighbors,
)
from pmet_lightning.tune.study import Stage, halving, open_storage, parameters_of, suggest
from pmet_lightning.tune.tuned import damage_notices


def outcome(efficacy: float, specificity: float = 0.9, kl: float = 0.1, count: int = 50, seed: int = 0) -> Outcome:
    """An outcome with scores of zeros and ones around these means."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((count, 1 + len(NAMES)), math.nan, dtype=torch.float64)
    rows[:, 0] = torch.arange(count)
    for name, mean in zip(CORE, (efficacy, efficacy, specificity), strict=True):
        ordered = (torch.arange(count) < round(mean * count)).double()
        rows[:, 1 + NAMES.index(name)] = ordered[torch.randperm(count, generator=generator)]
    rows[:, 1 + NAMES.index("specificity_kl")] = kl
    table = {name: float(value) for name, value in table_of(rows).items()}
    return Outcome(rows, table, 0.9, 0.1, {"targets": 1.0, "write": 1.0, "questions": 1.0})


def test_settings_that_ruin_the_model_are_told_of():
    """No trial looks at unrelated text; a search that wants efficacy at any price may find such settings."""
    found = outcome(0.9)
    for factor, said in (
        (1.2, ""),
        (2.0, "WARNING: the edits have changed"),
        (2000.0, "DAMAGED: the model is no longer"),
    ):
        reported = replace(found, scores={**found.scores, "perplexity": 10 * factor}, before={"perplexity": 10.0})
        assert "".join(damage_notices(reported)).startswith(said)
        assert bool(damage_notices(reported)) == bool(said)
    assert damage_notices(found) == [], "it was not measured"


# ---- the space ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3, 8, 18, 32])
def test_layers_are_looked_at_from_coarse_to_fine_up_to_two_thirds(depth):
    layers = target_layers(depth, range(depth))
    assert sorted(layers) == list(range(max(layers) + 1))
    assert max(layers) < max(1, depth - 1), "the last layer cannot hold a target"
    assert max(layers) <= depth * 2 / 3
    assert abs(layers[0] - depth / 4) <= 0.5 or depth < 3
    half = sorted(layers[1 : len(layers) // 2 + 2])
    gaps = [b - a for a, b in zip(half, half[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= max(2, depth // 6), "an early end has seen all depths"


def test_layers_without_ffn_are_left_out():
    assert set(target_layers(12, [1, 3, 4, 5, 9])) == {1, 3, 4, 5}
    assert widths_at(TargetSetting(5), [1, 3, 4, 5, 9]) == [1, 3]


def test_layers_for_which_there_is_evidence_come_first():
    all_layers = target_layers(12, range(12))
    assert target_layers(12, range(12), [2, 4]) == [2, 4, *(layer for layer in all_layers if layer not in (2, 4))]
    assert target_layers(12, range(12), [4, 11]) == [4, *(layer for layer in all_layers if layer != 4)], (
        "11 is too deep"
    )


@pytest.mark.parametrize(
    ("layer", "below", "above"),
    [(0, [1], [1, 3, 5]), (1, [1, 2], [1, 3, 5]), (3, [1, 3, 4], [1, 3, 5]), (9, [1, 3, 5], [1, 2])],
)
def test_layers_are_edited_down_from_a_delta_or_up_from_it(layer, below, above):
    spread, replay = TargetSetting(layer), TargetSetting(layer, targets="replay")
    assert widths_at(spread, range(11)) == below
    assert widths_at(replay, range(11)) == above
    assert Setting(spread, WriteSetting(below[-1])).layers == list(range(layer - below[-1] + 1, layer + 1))
    assert Setting(replay, WriteSetting(above[-1])).layers == list(range(layer, layer + above[-1]))
    assert directions_of(spread) == ("lam", "width", "rule")
    assert directions_of(replay) == ("lam", "width"), "each layer has targets of its own: nothing is shared"
    successive = TargetSetting(layer, targets="successive")
    assert widths_at(successive, range(11)) == above
    assert Setting(successive, WriteSetting(above[-1])).layers == list(range(layer, layer + above[-1]))
    assert directions_of(successive) == directions_of(replay)


def test_the_units_of_a_model_make_its_settings():
    scale = Scale({2: 0.5}, {2: 5.0}, key_width=100)
    setting = Setting(TargetSetting(2, "ffn", 3.0, 0.1), WriteSetting(3, "even", 2))
    sections = scale.sections(setting)
    assert sections["model"]["layers"] == [0, 1, 2]
    assert sections["model"]["optimizer"]["init_args"]["lr"] == 0.15  # 0.1 · 3 · 0.5
    assert sections["spread"] == {"lam": 90.0, "rule": "even", "targets": "spread"}  # 0.1 · 100 · 3²
    assert "stop_at_argmax" not in sections["model"]
    hidden = Setting(TargetSetting(2, "hidden", 3.0, 0.1), setting.write)
    assert scale.sections(hidden)["model"]["optimizer"]["init_args"]["lr"] == 1.5
    successive = scale.sections(Setting(TargetSetting(2, targets="successive"), setting.write))
    assert successive["model"]["stop_at_argmax"] is False, "what one write misses is seen by the next only in a loss"
    assert Setting.of(setting.plain()) == setting


def test_a_few_large_dimensions_do_not_make_the_size_of_an_entry():
    values = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    assert entry_size(3 * values) == pytest.approx(3, rel=0.03)
    values[:, 0] = 1e4
    assert entry_size(3 * values) == pytest.approx(3, rel=0.06)


def test_neighbors_of_a_write():
    here = WriteSetting(3, "sqrt", 0)
    assert [one.lam_step for one in write_neighbors(here, [1, 3], "lam")] == [-1, 1]
    assert [one.width for one in write_neighbors(here, [1, 3], "width")] == [1]
    assert [one.rule for one in write_neighbors(here, [1, 3], "rule")] == ["even"]
    assert write_neighbors(WriteSetting(1), [1, 3], "rule") == [], "of one layer there is nothing to share"
    assert len(write_neighbors(WriteSetting(1, "sqrt", LAM_STEPS[-1]), [1], "lam")) == 1


@pytest.mark.parametrize(("edits", "rungs"), [(200, [22, 66, 200]), (50, [16, 50]), (8, [8]), (360, [40, 120, 360])])
def test_each_rung_has_three_times_as_many_edits(edits, rungs):
    assert rungs_of(edits) == rungs
    assert rungs_of(edits, whole=False) == (rungs[:-1] if rungs[-1] > 3 * LARGE_RUNG else rungs)


def test_what_gets_a_delta_can_be_restricted():
    assert Budget().probes == list(PROBES)
    assert [probe.optimize for probe in Budget(optimize=["attn+ffn", "ffn"]).probes] == ["ffn"]
    assert [probe.optimize for probe in Budget(optimize=["attn+ffn"]).probes] == ["attn+ffn"]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert {suggest(study.ask(), [1], ["attn+ffn", "ffn"]).optimize for _ in range(20)} == {"attn+ffn", "ffn"}


def test_where_targets_come_from_can_be_restricted():
    assert {probe.targets for probe in Budget(targets=["replay"]).probes} == {"replay"}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert {suggest(study.ask(), [1]).targets for _ in range(20)} == {"spread", "replay", "successive"}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert {suggest(study.ask(), [1], targets=["replay"]).targets for _ in range(20)} == {"replay"}


# ---- the facts ----------------------------------------------------------------------------------------------


def item(*subjects: str) -> Item:
    return Item({"subjects": subjects}, tuple(Edit("0", "{} is", subject, "blue") for subject in subjects))


def subjects(items) -> set[str]:
    return set().union(*(one.subjects for one in items))


def test_both_parts_share_no_subject_not_even_by_way_of_another_record():
    chained = [item("A", "B"), item("b", "C"), item("c ", "D")]
    facts = own_facts([*chained, *(item(f"S{i % 30}") for i in range(60))], "facts", seed=1)
    assert not subjects(facts.tuning) & subjects(facts.reporting)
    assert len(facts.tuning) + len(facts.reporting) == 63
    assert abs(len(facts.tuning) - len(facts.reporting)) <= 3
    sides = [one in facts.tuning for one in chained]
    assert len(set(sides)) == 1
    again = own_facts([*chained, *(item(f"S{i % 30}") for i in range(60))], "facts", seed=1)
    assert again.tuning == facts.tuning
    other = own_facts([*chained, *(item(f"S{i % 30}") for i in range(60))], "facts", seed=2)
    assert other.tuning != facts.tuning


def test_too_few_facts_are_refused():
    with pytest.raises(RecordError, match=rf"facts.json: 20 records .* expected at least {LEAST} of each"):
        own_facts([item(f"S{i}") for i in range(20)], "facts.json", 0)
    with pytest.raises(RecordError, match="1 separate subjects make 40 to tune on and 0 to report"):
        own_facts([item("one") for _ in range(40)], "facts.json", 0)


def test_records_that_ask_nothing_about_neighbors_are_asked_about_shipped_facts():
    facts = own_facts([item(f"S{i}") for i in range(40)], "facts", 0)
    assert not asks_about_neighbors(facts.tuning)
    known = read_items("earth-tuning")[:5]
    found = with_bystanders(facts, known)
    assert asks_about_neighbors([*found.tuning, *found.reporting])
    assert [one.record for one in found.tuning] == [one.record for one in facts.tuning]
    assert with_bystanders(found, known) == found, "those that ask already are left alone"


def test_a_trial_asks_about_few_neighbors():
    edit = read_edits("earth-records", limit=1)[0]
    few = with_few_neighbors(edit, 3)
    assert sum(probe.kind == "specificity" for probe in few.probes) == 3
    assert [p for p in few.probes if p.kind != "specificity"] == [p for p in edit.probes if p.kind != "specificity"]
    assert few.identity() == edit.identity(), "its target is the same"
    repeated = Edit("0", "{} is", "S", "a", probes=(Probe("specificity", "x", "y"),) * 5)
    assert len(with_few_neighbors(repeated, 3).probes) == 3


# ---- the choice ---------------------------------------------------------------------------------------------


def test_of_equals_the_gentlest_is_chosen():
    seen = {"strong": outcome(0.90, kl=0.5), "gentle": outcome(0.90, kl=0.1), "weak": outcome(0.6, kl=0.0)}
    chosen, equal = choose(seen, lambda _: (0.0,))
    assert (chosen, set(equal)) == ("gentle", {"strong", "gentle"})
    same = {"large clamp": outcome(0.9), "small clamp": outcome(0.9)}
    chosen, _ = choose(same, lambda one: (float(one == "large clamp"),))
    assert chosen == "small clamp"


def test_what_is_half_a_point_below_is_no_equal():
    best, below = outcome(0.9, count=1000), outcome(0.88, count=1000, seed=3)
    assert best.score - below.score > TIE
    assert not is_tie(below, best)
    assert is_tie(best, best)


def test_the_search_for_writes_climbs_in_every_direction():
    asked = []

    def measure(write: WriteSetting) -> Outcome:
        asked.append(write)
        value = 0.9 - 0.1 * abs(write.lam_step - 3) - 0.1 * (write.width != 5) - 0.1 * (write.rule != "even")
        return outcome(max(value, 0.02))

    seen = search_writes(measure, WriteSetting(3), [1, 3, 5])
    assert best_of(seen) == WriteSetting(5, "even", 3)
    assert len(asked) == len(set(asked)) == len(seen), "nothing is measured twice"
    assert len(seen) < 10, "of 54"


def test_an_outcome_is_kept_as_json_and_joined():
    found = outcome(0.7)
    again = unpacked(packed(found))
    assert again.score == found.score
    columns = [1 + NAMES.index(name) for name in CORE]
    assert torch.equal(again.rows[:, columns], found.rows[:, columns])
    both = join([found, outcome(0.9)])
    assert both.scores["efficacy"] == pytest.approx(80)
    assert both.scores["count"] == 100
    assert both.seconds["write"] == 2


# ---- the storage --------------------------------------------------------------------------------------------


def fake(trial: optuna.Trial) -> float:
    """Best at clamp 4, layer 2; a trial with the attention's delta is bad."""
    target = suggest(trial, [1, 2, 3])
    value = 90 - 20 * abs(math.log(target.clamp / 4)) - 10 * abs(target.layer - 2)
    for count in (10, 30):
        trial.report(value, count)
        if count < 30 and trial.should_prune():
            raise optuna.TrialPruned
    return value


def tried(stage: Stage) -> list[tuple]:
    return [(trial.state.name, tuple(trial.params.values())) for trial in stage.finished()]


def test_a_stopped_search_goes_on_as_it_would_have(tmp_path):
    whole = Stage(open_storage(None, tmp_path / "whole"), "search", True, 5, halving(10))
    start = parameters_of(TargetSetting(1, clamp=0.5))
    for number in range(14):
        whole.run(fake, start if number == 0 else None)
    for number in range(8):
        first = Stage(open_storage(None, tmp_path / "parts"), "search", True, 5, halving(10))
        first.run(fake, start if number == 0 else None)

    def interrupted(trial):
        suggest(trial, [1, 2, 3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(interrupted)
    first.study.ask()  # of a process that was killed
    second = Stage(open_storage(None, tmp_path / "parts"), "search", True, 5, halving(10))
    for _ in range(6):
        second.run(fake)
    assert tried(second) == tried(whole)
    states = [state for state, _ in tried(whole)]
    assert len(states) == 14
    assert 2 <= states.count("PRUNED") <= 12, "bad ones are stopped early"
    assert whole.study.best_value > fake_start()
    assert whole.seconds > 0
    other = Stage(open_storage(None, tmp_path / "other"), "search", True, 6, halving(10))
    other.run(fake, start)
    other.run(fake)
    assert tried(other)[1] != tried(whole)[1], "another seed tries others"


def fake_start() -> float:
    return 90 - 20 * math.log(8) - 10


def test_values_are_made_once(tmp_path):
    stage = Stage(open_storage(None, tmp_path), "search", True)
    assert stage.remember("edits", lambda: 40) == 40
    assert stage.remember("edits", lambda: 50) == 40


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # which a trial that is only asked for has none of
def test_processes_that_search_together_leave_each_other_alone(tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    one = Stage(open_storage(url, tmp_path), "search", alone=False)
    running = one.study.ask()
    two = Stage(open_storage(url, tmp_path), "search", alone=False)
    assert two.count == 1
    assert two.study.trials[running.number].state.name == "RUNNING"


# ---- the figures --------------------------------------------------------------------------------------------


def test_the_frontier_is_what_nothing_exceeds():
    points = [(90, 50), (80, 70), (85, 60), (70, 65), (60, 90)]
    rows = [{"specificity": float(s), "efficacy": float(e)} for s, e in points]
    assert [(row["specificity"], row["efficacy"]) for row in frontier(rows)] == [(60, 90), (80, 70), (85, 60), (90, 50)]


def test_words_have_places_on_an_axis():
    assert positions([{"rule": "sqrt"}, {"rule": "even"}], "rule") == ([1.0, 0.0], ["even", "sqrt"])
    assert positions([{"lam": 3.0}], "lam") == ([3.0], [])


def test_a_process_runs_the_trials_that_it_wants_and_not_those_of_another(tmp_path, monkeypatch):
    """With a queue of trials, a process on the same database took what another one had just put there."""
    storage = open_storage(None, tmp_path)
    here, there = (Stage(storage, "one", alone=False) for _ in range(2))
    optimize, found = optuna.Study.optimize, []

    def late(study, *args, **kwargs):
        if study is here.study and not found:
            found.append(there.run(lambda trial: trial.suggest_int("layer", 0, 5), {"layer": 4}))
        optimize(study, *args, **kwargs)

    monkeypatch.setattr(optuna.Study, "optimize", late)
    found.append(here.run(lambda trial: trial.suggest_int("layer", 0, 5), {"layer": 1}))
    assert [trial.params for trial in found] == [{"layer": 4}, {"layer": 1}]

"""The editor against its plain twin, and the exactness of batching, on tiny random models."""

from __future__ import annotations

import copy
import random
import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.plain import plain_target
from pmet_lightning import Edit, TargetOptimizer
from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.data.records import Probe, parse_record
from pmet_lightning.evaluation.probes import score_probes
from pmet_lightning.model import prefix_passes as prefix
from pmet_lightning.model.architectures import ARCHITECTURES, architecture_of
from pmet_lightning.model.loading import load_config, load_model
from pmet_lightning.model.projections import Sites, in_features
from pmet_lightning.targets import row_cache
from pmet_lightning.targets import target_optimizer as module_of_targets
from pmet_lightning.targets.active_batch import ActiveBatch
from pmet_lightning.targets.loop import TargetLoop
from pmet_lightning.targets.store import PARTS, mean_curves, overall_curves
from pmet_lightning.utils.resources import locate
from pmet_lightning.write import keys
from tests.conftest import mostly_slow
from tests.harness import edit, matrices
from tests.plain import plain_spread
from tests.tiny import CONFIGS, CONTEXTS, RECORDS, WINDOWED, save_tiny

# GPT-J's attention is computed in float32 even in a float64 model, and so is Llama's norm.
EXACT = {"gpt2": 1e-9}
# Where a window holds nothing but padding, eager attention gives NaN in float64: its mask overflows the softmax, which
# is taken in float32.
SLIDING = (*WINDOWED, "gpt_neo")
# A window that is shorter than the rows, one between the shortest and the longest of them, one that holds all.
WINDOWS = [
    (family, window) for family in sorted(CONFIGS) for window in ((None, 20, 512) if family in WINDOWED else (None,))
]
SETTINGS = {
    "layers": [1, 2], "steps": 8, "clamp": 2.0, "kl_factor": 0.5, "norm_factor": 0.2, "target_value": "stored",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made: dict[str, str] = {"atlas": locate("atlas")}

    def get(family: str, window: int | None = None) -> str:
        name = family if window is None else f"{family}-{window}"
        if name not in made:
            made[name] = save_tiny(family, tmp_path_factory.mktemp(name), window=window)
        return made[name]

    return get


def tiny_module(folder: str, **changed) -> TargetOptimizer:
    settings = {**SETTINGS, "contexts": CONTEXTS, "dtype": "float64", "attn_implementation": "eager", **changed}
    return TargetOptimizer(model_name=folder, optimizer=partial(torch.optim.Adam, lr=0.3), **settings)


def moments_for(folder: str, layers=(1, 2)) -> dict:
    model = load_model(folder)
    sites = Sites.of(model, architecture_of(load_config(folder)))
    generator = torch.Generator().manual_seed(3)
    result = {}
    for layer in layers:
        for site in ("ffn", "attn"):
            width = in_features(sites.module(site, layer))
            samples = torch.randn(4 * width, width, generator=generator)
            result[site, layer] = samples.T @ samples / len(samples)
    return result


def run(folder: str, tmp_path, records=RECORDS, data=None, **changed):
    spread, reports = edit(
        tiny_module(folder, **changed), records, moments_for(folder), tmp_path, lam=2.0, **(data or {})
    )
    values = {e.question: t.values["ffn", 2] for r in reports for e, t in zip(r.edits, r.targets, strict=True)}
    return values, matrices(spread.edited.deltas), reports


def certainty(model, tokenizer, asked: Edit) -> float:
    """P(o*) of the bare prompt."""
    ((score,),) = score_probes(
        model, PromptEncoder(tokenizer), [[Probe("efficacy", asked.question, asked.target)]], 512, torch.device("cpu")
    )
    return score.magnitude


@pytest.mark.parametrize(
    ("family", "window"), mostly_slow(WINDOWS, [w for w in WINDOWS if w[1] is None or w[0] == "gemma2"])
)
def test_equals_the_plain_twin(family, window, folder_of, tmp_path):
    folder, dtype = folder_of(family, window), "float32" if family in SLIDING else "float64"
    tolerance = EXACT.get(family, 1e-5 if dtype == "float64" else 1e-3)
    values, deltas, reports = run(folder, tmp_path, RECORDS[:4], dtype=dtype)
    model = load_model(folder, dtype, "eager")
    tokenizer = load_tokenizer(folder)
    sites = Sites.of(model, architecture_of(load_config(folder)))
    edits = [parse_record(r, i, "") for i, r in enumerate(RECORDS[:4])]
    weights = {"nll": 1.0, "kl": 0.5, "norm": 0.2}
    modules = (sites.module("attn", 2), sites.module("ffn", 2))
    targets = []
    for i, e in enumerate(edits):
        target, steps = plain_target(model, tokenizer, *modules, e, CONTEXTS, steps=8, lr=0.3, clamp=2.0, **weights)
        assert steps == reports[0].targets[i].record["steps"]
        assert float((values[e.question] - target).norm() / target.norm()) < tolerance
        targets.append(target)
    c = moments_for(folder)
    projections = [sites.module("ffn", layer) for layer in (1, 2)]
    norms = [sites.norm("ffn", layer) for layer in (1, 2)]
    updates = plain_spread(
        model, tokenizer, projections, edits, targets, CONTEXTS, [c["ffn", 1], c["ffn", 2]], 2.0,
        norms if norms[0] is not None else None,
    )  # fmt: skip
    for layer, update in zip((1, 2), updates, strict=True):
        found = deltas[sites.weight_name("ffn", layer)]
        assert float((found - update).norm() / update.norm()) < tolerance


@pytest.mark.parametrize("family", mostly_slow(sorted(CONFIGS), ["gpt2", "gptj", "llama", "gemma2", "falcon", "opt"]))
def test_an_edit_raises_the_target(family, folder_of, tmp_path):
    """One layer, few edits, a small λ: what is written is what was optimized, whatever the family does to it."""
    folder = folder_of(family)
    changes = {"layers": [3], "optimize": "ffn", "contexts": [], "clamp": 100.0, "norm_factor": 0.0, "kl_factor": 0.0}
    module = tiny_module(folder, dtype="float32", **changes)
    # One token each: the write, unlike the delta, is at work at a target's other tokens too.
    answers = ("Lisbon", "Swedish", "French")
    records = [{**r, "prompt": "People speak of {}", "target_new": o} for r, o in zip(RECORDS, answers, strict=False)]
    _, reports = edit(module, records, moments_for(folder, (3,)), tmp_path, lam=1e-4)
    clean, tokenizer = load_model(folder, "float32", "eager"), load_tokenizer(folder)
    for e, target in zip(reports[0].edits, reports[0].targets, strict=True):
        before, after = certainty(clean, tokenizer, e), certainty(module.model, tokenizer, e)
        assert before == pytest.approx(target.record["p_prompt_before"], rel=1e-3)
        assert after == pytest.approx(target.record["p_after"], rel=1e-2)
        assert after > 1.02 * before


VARIANTS = {
    "one by one": {"micro_batch": 1},
    "seven at a time": {"micro_batch": 7},
    "three at a time": {"micro_batch": 3},
    "as many as fit": {"micro_batch": "auto"},
    # no eager: its masks overflow in some float64 families where a row begins with padding
    "left padding": {"padding_side": "left", "attn_implementation": None},
    "small passes": {"tokens_per_batch": 30},
    "shuffled": {"shuffle": True},
    "whole model": {"suffix_only": False},
    "nothing shared": {"nothing_shared": True},
    "no plain cache": {"no_cache": True},
    "two tokens' logits at a time": {"few_logits": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", mostly_slow(["gpt2", "gptj", "llama"], ["gpt2"]))
def test_batching_is_exact(family, variant, folder_of, tmp_path_factory, monkeypatch):
    folder, change = folder_of(family), copy.deepcopy(VARIANTS[variant])
    records = list(RECORDS)
    values, deltas, _ = run(folder, tmp_path_factory.mktemp("a"), micro_batch=64)
    if change.pop("nothing_shared", False):
        monkeypatch.setattr(keys, "compute_prefix", lambda *_: None)
    if change.pop("no_cache", False):
        monkeypatch.setattr(prefix, "is_plain_layer", lambda *_: False)
    if change.pop("few_logits", False):
        monkeypatch.setattr(row_cache, "most_logit_rows", lambda _: 2)
    if change.pop("shuffle", False):
        random.Random(1).shuffle(records)
    other_values, other_deltas, _ = run(folder, tmp_path_factory.mktemp("b"), records, **change)
    tolerance = EXACT.get(family, 1e-5)
    assert set(values) == set(other_values)
    for question, value in values.items():
        assert float((other_values[question] - value).norm() / value.norm()) < tolerance
    for name, delta in deltas.items():
        assert float((other_deltas[name] - delta).norm() / delta.norm()) < tolerance


@pytest.mark.parametrize("change", [{"suffix_only": False}, {"micro_batch": 3}], ids=["whole model", "three at a time"])
@pytest.mark.parametrize("family", ["gpt_neox", "phi", "opt"])
def test_batching_is_exact_to_1e_8_in_float64(family, change, folder_of, tmp_path_factory):
    """Two parallel blocks, in which the FFN above L is kept, and a sequential one; all of them float64 throughout."""
    folder, sdpa = folder_of(family), {"attn_implementation": None}
    values, deltas, _ = run(folder, tmp_path_factory.mktemp("a"), **sdpa)
    other_values, other_deltas, _ = run(folder, tmp_path_factory.mktemp("b"), **sdpa, **change)
    for question, value in values.items():
        assert float((other_values[question] - value).norm() / value.norm()) < 1e-8
    for name, delta in deltas.items():
        assert float((other_deltas[name] - delta).norm() / delta.norm()) < 1e-8


def test_the_last_layer_gets_a_warning(folder_of, caplog):
    tiny_module(folder_of("gpt2"), layers=[2]).setup("fit")
    assert "last" not in caplog.text
    tiny_module(folder_of("gpt2"), layers=[2, 3]).setup("fit")
    assert "layer 3 is the model's last" in caplog.text


def test_edits_stop_on_their_own_and_then_stay(folder_of, tmp_path):
    """With a generous tolerance some edits stop early; alone or among others they get the same target."""
    folder = folder_of("gpt2")
    changed = {"loss_tolerance": 8.5, "steps": 20, "clamp": 8.0}
    values, _, reports = run(folder, tmp_path, **changed)
    steps = [t.record["steps"] for t in reports[0].targets]
    assert len(set(steps)) > 1
    for number, record in enumerate(RECORDS):
        alone = tmp_path / str(number)
        alone.mkdir()
        own, _, own_reports = run(folder, alone, [record], **changed)
        assert own_reports[0].targets[0].record["steps"] == steps[number]
        ((question, value),) = own.items()
        torch.testing.assert_close(values[question], value, rtol=0, atol=1e-9)


def test_without_the_argmax_rule_only_the_loss_stops(folder_of, tmp_path_factory):
    """From where PMET's rule stops an edit of Atlas, its target only becomes more certain."""
    atlas, records = folder_of("atlas"), RECORDS[:4]
    changes = {"steps": 25, "clamp": 50.0, "norm_factor": 0.0, "kl_factor": 0.0, "dtype": "float32", "contexts": []}
    _, _, ruled = run(atlas, tmp_path_factory.mktemp("a"), records, **changes)
    _, _, free = run(atlas, tmp_path_factory.mktemp("b"), records, stop_at_argmax=False, **changes)
    pairs = [(a.record, b.record) for a, b in zip(ruled[0].targets, free[0].targets, strict=True)]
    assert "argmax" in {a["stop_reason"] for a, _ in pairs}
    for a, b in pairs:
        assert b["stop_reason"] in ("loss", "steps")
        if a["stop_reason"] == "argmax":
            assert b["steps"] > a["steps"]
            assert b["p_after"] > a["p_after"]


def test_realised_and_stored_targets(folder_of, tmp_path_factory):
    """Equal in a parallel block, different in a sequential one."""
    for family, equal in (("gptj", True), ("gpt2", False)):
        stored, _, _ = run(folder_of(family), tmp_path_factory.mktemp("s"))
        realized, _, _ = run(folder_of(family), tmp_path_factory.mktemp("r"), target_value="realized")
        distance = max(float((stored[q] - realized[q]).norm()) for q in stored)
        assert (distance < 1e-9) == equal


def count_searches(monkeypatch) -> list[tuple[int, int]]:
    """Layer and number of edits of each search to come."""
    searches, original = [], TargetOptimizer.iter_targets

    def counted(self, edits, layer):
        searches.append((layer, len(edits)))
        return original(self, edits, layer)

    monkeypatch.setattr(TargetOptimizer, "iter_targets", counted)
    return searches


def test_targets_are_stored_and_reused(folder_of, tmp_path, monkeypatch):
    folder, store = folder_of("gpt2"), str(tmp_path / "targets")
    values, deltas, _ = run(folder, tmp_path, targets_folder=store)
    searches = count_searches(monkeypatch)
    again, deltas_again, reports = run(folder, tmp_path, targets_folder=store)
    assert [count for _, count in searches] == [0]
    assert all(t.history_SP.shape == (t.record["steps"], len(PARTS)) for t in reports[0].targets)
    assert all(torch.equal(values[q], again[q]) for q in values)
    assert all(torch.equal(deltas[n], deltas_again[n]) for n in deltas)
    run(folder, tmp_path, targets_folder=store, clamp=1.5)  # another setting is another target
    run(folder, tmp_path, targets_folder=store, contexts=CONTEXTS[:1])
    elsewhere = replace(ARCHITECTURES["gpt2"], attn="mlp.c_proj")  # nothing but a place that differs
    run(folder, tmp_path, targets_folder=store, architecture=elsewhere)
    assert [count for _, count in searches] == [0, *[len(RECORDS)] * 3]


def test_contexts_are_stored_and_reused(folder_of, tmp_path, monkeypatch):
    store, sampled, original = tmp_path / "targets", [], module_of_targets.sample_contexts
    monkeypatch.setattr(
        module_of_targets, "sample_contexts", lambda *a, **how: sampled.append(how["seed"]) or original(*a, **how)
    )
    changed = {"targets_folder": str(store), "contexts": None, "context_count": 2, "context_length": 3, "steps": 2}

    def contexts(**more):
        module = tiny_module(folder_of("gpt2"), **changed, **more)
        edit(module, RECORDS[:1], moments_for(folder_of("gpt2")), tmp_path, lam=2.0)
        return module.contexts

    first = contexts()
    assert len(first) == 2
    assert contexts() == first
    assert contexts(seed=1) != first
    assert sampled == [0, 1]
    for path in store.glob("contexts-*"):
        path.write_text("[1", encoding="utf-8")
    assert contexts() == first
    assert sampled == [0, 1, 0]


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
@pytest.mark.parametrize("micro_batch", [3, 5])
def test_places_are_taken_again_as_edits_stop(family, micro_batch, folder_of, tmp_path_factory, monkeypatch):
    """Looked at at every step or now and then, edits that come and go get the targets of edits on their own."""
    folder = folder_of(family)
    changed = {"steps": 9, "clamp": 8.0, "dtype": "float32" if family in SLIDING else "float64"}
    tolerance = 1e-3 if family in SLIDING else 1e-9
    _, _, whole = run(folder, tmp_path_factory.mktemp("w"), loss_tolerance=0.0, **changed)
    lowest = [float(t.history_SP[:, PARTS.index("loss")].min()) for t in whole[0].targets]
    changed["loss_tolerance"] = sorted(lowest)[len(lowest) // 2] + 0.01  # about half of them get there
    _, _, alone = run(folder, tmp_path_factory.mktemp("a"), micro_batch=1, **changed)
    joined = []
    monkeypatch.setattr(
        ActiveBatch, "join", lambda self, other, own=ActiveBatch.join: joined.append(1) or own(self, other)
    )
    for sync_every in (1, 4):
        monkeypatch.setitem(module_of_targets.SYNC_EVERY, "cpu", sync_every)
        _, _, together = run(folder, tmp_path_factory.mktemp("b"), micro_batch=micro_batch, **changed)
        for a, b in zip(alone[0].targets, together[0].targets, strict=True):
            assert (a.record["steps"], a.record["stop_reason"]) == (b.record["steps"], b.record["stop_reason"])
            torch.testing.assert_close(b.values["ffn", 2], a.values["ffn", 2], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(b.history_SP, a.history_SP, rtol=tolerance, atol=tolerance)
    assert joined, "edits entered beside others"
    assert len({t.record["steps"] for t in alone[0].targets}) > 1


def test_a_lack_of_memory_halves_the_active_edits(folder_of, tmp_path_factory, monkeypatch, caplog):
    folder = folder_of("gpt2")
    values, _, _ = run(folder, tmp_path_factory.mktemp("a"))
    sizes, forward = [], TargetLoop.forward

    def limited(self, rows, leaves):
        sizes.append(len(rows.rows) // rows.per_edit)
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("of the test")
        return forward(self, rows, leaves)

    monkeypatch.setattr(TargetLoop, "forward", limited)
    most = 3
    found, _, _ = run(folder, tmp_path_factory.mktemp("b"), micro_batch=64)
    assert (sizes[0], max(sizes[1:])) == (len(RECORDS), 3)
    assert "going on with 3" in caplog.text
    for question, value in values.items():
        torch.testing.assert_close(found[question], value, rtol=0, atol=1e-9)
    most = 0
    with pytest.raises(RuntimeError, match=r"out of memory with a single edit .*records.json"):
        run(folder, tmp_path_factory.mktemp("c"))


def test_curves_are_means_over_the_edits_that_took_a_step(folder_of, tmp_path):
    _, _, reports = run(folder_of("gpt2"), tmp_path, loss_tolerance=8.5, clamp=8.0)
    histories = [t.history_SP for t in reports[0].targets]
    points = mean_curves(reports[0].targets)
    assert len(points) == max(map(len, histories))
    for step, point in enumerate(points):
        there = [h[step, PARTS.index("loss")] for h in histories if len(h) > step]
        assert point["active_edits"] == len(there)
        assert point["loss"] == pytest.approx(float(sum(there)) / len(there))


def test_overall_curves_are_over_all_edits_and_do_not_jump(folder_of, tmp_path):
    """What the report draws: an edit that has stopped keeps its last values, against a plain loop."""
    _, _, reports = run(folder_of("gpt2"), tmp_path, loss_tolerance=8.5, clamp=8.0)
    histories = [t.history_SP.tolist() for t in reports[0].targets]
    points = overall_curves(reports[0].targets)
    assert [point["step"] for point in points] == list(range(max(map(len, histories))))
    assert points[-1]["active_edits"] < points[0]["active_edits"] == len(histories)
    for step, point in enumerate(points):
        assert point["active_edits"] == sum(len(h) > step for h in histories)
        for name in ("loss", "p", "p_prompt"):
            values = [h[min(step, len(h) - 1)][PARTS.index(name)] for h in histories]
            assert point[name] == pytest.approx(sum(values) / len(values))
            if name != "p_prompt":
                low, _, high = statistics.quantiles(values, n=4, method="inclusive")
                assert [point[f"{name}_q25"], point[f"{name}_q75"]] == pytest.approx([low, high])
    ends = [h[-1] for h in histories]
    assert points[-1]["loss"] == pytest.approx(sum(end[PARTS.index("loss")] for end in ends) / len(ends))


def test_edit_batches_are_written_one_after_the_other(folder_of, tmp_path):
    _, _, reports = run(folder_of("gpt2"), tmp_path, data={"edit_batch": 3}, micro_batch=2)
    assert [len(r.edits) for r in reports] == [3, 3, 1]
    assert [r.edit_batch for r in reports] == [0, 1, 2]


def test_writing_moves_the_model_to_the_target(folder_of, tmp_path):
    """With a negligible λ every edit's value at the target layer becomes its target."""
    folder = folder_of("gptj")
    module = tiny_module(folder, contexts=[])  # keys are then those of the bare prompts
    records = [RECORDS[i] for i in (0, 1, 2, 3)]
    _, reports = edit(module, records, moments_for(folder), tmp_path, lam=1e-6)
    assert max(reports[0].residual_left) < 1e-3


def test_a_failing_solve_leaves_every_weight(folder_of, tmp_path, monkeypatch):
    from pmet_lightning.write import weight_spread as spread_module

    folder = folder_of("gpt2")
    module = tiny_module(folder)
    collect, seen = spread_module.measure_keys, []

    def fail_on_the_second(*args):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return collect(*args)

    monkeypatch.setattr(spread_module, "measure_keys", fail_on_the_second)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        edit(module, RECORDS, moments_for(folder), tmp_path, lam=2.0)
    assert len(seen) == 2  # the first layer had been written
    clean = load_model(folder, "float64").state_dict()
    assert all(torch.equal(clean[name], value) for name, value in module.model.state_dict().items())


def test_nan_names_the_edit(folder_of, tmp_path):
    folder = folder_of("gpt2")
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    broken = tmp_path / "broken"
    token = tokenizer(" Ravi Oskelund", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        model.transformer.wte.weight[token] = float("nan")
    model.save_pretrained(broken)
    tokenizer.save_pretrained(broken)
    with pytest.raises(FloatingPointError, match="record 3"):
        edit(tiny_module(str(broken)), RECORDS, moments_for(str(broken)), tmp_path, lam=2.0)


@pytest.mark.slow  # compiling takes longer than everything else here
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
def test_compiled_ffns_find_the_same_targets(folder_of, tmp_path_factory):
    torch._dynamo.reset()
    plain, compiled = (
        run(folder_of("gptj"), tmp_path_factory.mktemp("run"), compile_ffn=compile_ffn)[0]
        for compile_ffn in (False, True)
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for question, value in plain.items():
        torch.testing.assert_close(compiled[question], value, rtol=1e-8, atol=1e-10)


def test_edit_identity_depends_on_what_the_target_depends_on():
    one = Edit("0", "{} is", "A", "B")
    assert one.identity() == Edit("7", "{} is", "A", "B", origin="elsewhere").identity()
    assert len({one.identity(), Edit("0", "{} was", "A", "B").identity(), Edit("0", "{} is", "A", "C").identity()}) == 3

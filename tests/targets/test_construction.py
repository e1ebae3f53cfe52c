"""Constructions of targets against plain passes over the whole model, one prompt at a time."""

from __future__ import annotations

import shutil
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.data.records import parse_record
from pmet_lightning.model.architectures import architecture_of
from pmet_lightning.model.loading import load_config, load_model
from pmet_lightning.model.projections import Sites
from pmet_lightning.targets.construction import delta_layers, early_layers, target_layers, written_layers
from pmet_lightning.targets.replay import replayed_values
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from tests.conftest import mostly_slow
from tests.harness import edit, matrices
from tests.plain import locate, plain_record, plain_spread
from tests.targets.test_target_optimizer import EXACT, count_searches, folder_of, moments_for, tiny_module  # noqa: F401
from tests.tiny import CONTEXTS, RECORDS

LAYERS = (0, 1, 2)
# One parallel block, one sequential, one whose projections are followed by norms.
FAMILIES = ("gptj", "llama", "gemma3")


def plain_parts(folder: str):
    dtype = "float32" if "gemma3" in folder else "float64"
    model = load_model(folder, dtype, "eager")
    return model, load_tokenizer(folder), Sites.of(model, architecture_of(load_config(folder)))


def added(module, index: int, vector: torch.Tensor):
    """Add a vector to a module's output at one token of the only row."""

    def hook(_, __, output):
        whole = output[0] if isinstance(output, tuple) else output
        changed = whole.clone()
        changed.view(-1, changed.shape[-1])[index] += vector.to(changed)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return module.register_forward_hook(hook).remove


def plain_values(model, tokenizer, asked, deltas, outputs) -> list[torch.Tensor]:
    """Outputs of modules at the subject's last token, with vectors added at other modules there."""
    head = asked.prompt.split("{}")[0] + asked.subject
    index = locate(tokenizer, asked.prompt.replace("{}", asked.subject), len(head))
    with ExitStack() as stack:
        for module, vector in deltas:
            stack.callback(added(module, index, vector))
        return [plain_record(model, tokenizer, module, asked, "{}", output=True) for module in outputs]


def run(folder, tmp_path, targets: str, **changed):
    dtype = "float32" if "gemma3" in folder else "float64"
    module = tiny_module(folder, **{"layers": list(LAYERS), "dtype": dtype, **changed})
    spread, reports = edit(module, RECORDS, moments_for(folder, LAYERS), tmp_path, lam=2.0, targets=targets)
    return reports[0], matrices(spread.edited.deltas)


def test_layers_of_a_construction():
    layers, constructions = [3, 4, 6], ("spread", "own", "replay", "successive")
    assert [delta_layers(layers, c) for c in constructions] == [[6], [3, 6], [3], layers]
    assert [early_layers(layers, c) for c in constructions] == [[6], [3, 6], [3], [3]]
    assert [target_layers(layers, c) for c in constructions] == [[6], [3, 6], layers, layers]
    assert [written_layers(layers, c) for c in constructions] == [layers, [3, 6], layers, layers]
    assert delta_layers([5], "own") == target_layers([5], "replay") == written_layers([5], "own") == [5]


@pytest.mark.parametrize("optimize", ["ffn", "hidden"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_targets_are_those_of_a_plain_pass(family, optimize, folder_of, tmp_path):  # noqa: F811
    """The delta of the first layer, in place in the whole model, gives the later layers' targets."""
    folder = folder_of(family)
    report, _ = run(folder, tmp_path, "replay", optimize=optimize)
    model, tokenizer, sites = plain_parts(folder)
    tolerance = 1e-4 if family == "gemma3" else EXACT.get(family, 1e-5)
    first, *later = (sites.module(optimize, layer) for layer in LAYERS)
    changed = 0.0
    for asked, target in zip(report.edits, report.targets, strict=True):
        (clean,) = plain_values(model, tokenizer, asked, [], [first])
        delta = target.values[optimize, 0] - clean
        expected = plain_values(model, tokenizer, asked, [(first, delta)], later)
        for layer, value in zip(LAYERS[1:], expected, strict=True):
            assert float((target.values[optimize, layer] - value).norm() / value.norm()) < tolerance
        without = plain_values(model, tokenizer, asked, [], later)
        changed = max(changed, *(float((a - b).norm() / b.norm()) for a, b in zip(expected, without, strict=True)))
    assert changed > 1e3 * tolerance, "the delta reaches the layers above"


@pytest.mark.parametrize(("family", "padding_side"), [*((f, "right") for f in FAMILIES), ("gptj", "left")])
def test_a_replay_of_both_deltas_is_a_plain_pass(family, padding_side, folder_of):  # noqa: F811
    folder = folder_of(family)
    model, tokenizer, sites = plain_parts(folder)
    encoder, edits = PromptEncoder(tokenizer), [parse_record(record, i, "") for i, record in enumerate(RECORDS)]
    width = sites.width
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    deltas = {s: torch.randn(len(edits), width, generator=generator, dtype=dtype) for s in ("attn", "ffn")}
    modules = {site: sites.module(site, 0) for site in deltas}
    later = {("ffn", layer): sites.module("ffn", layer) for layer in (1, 2)}
    rows = [encoder.encode(e.prompt, e.subject, target=e.target) for e in edits]
    found = replayed_values(model, rows, deltas, modules, later, pad_id=encoder.pad_id, padding_side=padding_side)
    for i, asked in enumerate(edits):
        pairs = [(modules[site], deltas[site][i]) for site in deltas]
        for place, expected in zip(later, plain_values(model, tokenizer, asked, pairs, later.values()), strict=True):
            torch.testing.assert_close(found[place][i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", ["own", "replay", "successive"])
@pytest.mark.parametrize("family", mostly_slow([*FAMILIES, "gpt2"], ["gptj", "gpt2"]))  # the last: transposed weights
def test_every_layer_is_written_towards_its_own_target(family, targets, folder_of, tmp_path):  # noqa: F811
    """As one plain write of a single layer after the other, each of its own targets and of the whole residual."""
    folder = folder_of(family)
    report, deltas = run(folder, tmp_path, targets)
    model, tokenizer, sites = plain_parts(folder)
    moments, tolerance = moments_for(folder, LAYERS), 1e-3 if family == "gemma3" else EXACT.get(family, 1e-5)
    written = written_layers(LAYERS, targets)
    assert set(deltas) == {sites.weight_name("ffn", layer) for layer in written}
    for layer in written:
        norm = sites.norm("ffn", layer)
        (expected,) = plain_spread(
            model, tokenizer, [sites.module("ffn", layer)], report.edits,
            [target.values["ffn", layer] for target in report.targets], CONTEXTS, [moments["ffn", layer]], 2.0,
            None if norm is None else [norm],
        )  # fmt: skip
        found = deltas[sites.weight_name("ffn", layer)]
        assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_own_targets_are_those_of_each_layer_alone(family, folder_of, tmp_path_factory):  # noqa: F811
    folder = folder_of(family)
    together, _ = run(folder, tmp_path_factory.mktemp("own"), "own")
    for layer in (0, 2):
        alone, _ = run(folder, tmp_path_factory.mktemp("one"), "spread", layers=[layer])
        for a, b in zip(together.targets, alone.targets, strict=True):
            torch.testing.assert_close(a.values["ffn", layer], b.values["ffn", layer], rtol=1e-9, atol=1e-9)
    below = [target.record["p_after_0"] for target in together.targets]
    assert below != [target.record["p_after"] for target in together.targets]


def test_constructions_share_the_stored_targets_of_a_layer(folder_of, tmp_path, monkeypatch):  # noqa: F811
    folder, searches, count = folder_of("llama"), count_searches(monkeypatch), len(RECORDS)
    store = {"targets_folder": str(tmp_path / "targets")}
    spread, replay, own = (run(folder, tmp_path, c, **store) for c in ("spread", "replay", "own"))
    assert searches == [(2, count), (0, count), (0, 0), (2, 0)]
    for last, first, both in zip(spread[0].targets, replay[0].targets, own[0].targets, strict=True):
        assert set(both.values) == {(site, layer) for site in ("attn", "ffn") for layer in (0, 2)}
        for (site, layer), value in both.values.items():
            assert torch.equal(value, (first if layer == 0 else last).values[site, layer])
        assert torch.equal(both.history_SP, last.history_SP)
        assert both.record["p_after_0"] == first.record["p_after"]
    again, deltas = run(folder, tmp_path, "replay", **store)
    assert searches[4:] == [(0, 0)]
    for a, b in zip(replay[0].targets, again.targets, strict=True):
        assert set(a.values) == set(b.values)
        assert all(torch.equal(value, b.values[place]) for place, value in a.values.items())
    assert all(torch.equal(delta, deltas[name]) for name, delta in replay[1].items())
    run(folder, tmp_path, "replay", **store, layers=[0, 1])  # a pass with other layers above
    assert searches[5:] == [(0, count)]


def test_targets_of_the_first_layer_survive_an_end_in_the_last(folder_of, tmp_path, monkeypatch):  # noqa: F811
    folder, searches, counted = folder_of("llama"), count_searches(monkeypatch), TargetOptimizer.iter_targets
    store = {"targets_folder": str(tmp_path / "targets")}

    def ends(self, edits, layer):
        if layer:
            raise FloatingPointError("the second search ends")
        return counted(self, edits, layer)

    monkeypatch.setattr(TargetOptimizer, "iter_targets", ends)
    with pytest.raises(FloatingPointError, match="the second search ends"):
        run(folder, tmp_path, "own", **store)
    monkeypatch.setattr(TargetOptimizer, "iter_targets", counted)
    run(folder, tmp_path, "own", **store)
    assert searches == [(0, len(RECORDS)), (0, 0), (2, len(RECORDS))]


@pytest.mark.parametrize("optimize", mostly_slow(["attn+ffn", "hidden"], ["attn+ffn"]))
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ["llama"]))
def test_successive_targets_are_those_of_one_run_after_the_other(family, optimize, folder_of, tmp_path):  # noqa: F811
    """Each of a single layer, on a model into which the runs before have been written."""
    folder, tolerance = folder_of(family), 1e-3 if family == "gemma3" else EXACT.get(family, 1e-5)
    report, deltas = run(folder, tmp_path, "successive", optimize=optimize, clamp=10.0)
    assert all(target.record["p_before"] == target.record["p_before_0"] for target in report.targets)
    edited = tmp_path / f"edited_{family}"
    shutil.copytree(folder, edited)
    moved = 0.0
    for layer in LAYERS:
        alone, written = run(str(edited), tmp_path, "spread", optimize=optimize, clamp=10.0, layers=[layer])
        ((name, delta),) = written.items()
        assert float((deltas[name] - delta).norm() / delta.norm()) < tolerance
        for a, b in zip(report.targets, alone.targets, strict=True):
            for place, value in b.values.items():
                assert float((a.values[place] - value).norm() / value.norm()) < tolerance
            number = "" if layer == LAYERS[-1] else f"_{layer}"
            assert a.record[f"p_after{number}"] == pytest.approx(b.record["p_after"], rel=1e-3)
            if number:
                assert a.record[f"p_before{number}"] == pytest.approx(b.record["p_before"], rel=1e-3)
            moved += abs(b.record["p_before"] / a.record["p_before_0"] - 1)
        weights = load_file(edited / "model.safetensors")
        path = f".{layer}.{name.split(f'.{layer}.')[1]}"  # a checkpoint may begin it otherwise
        (stored,) = (key for key in weights if key.endswith(path))
        weights[stored] = weights[stored].to(delta.dtype) + delta
        save_file(weights, edited / "model.safetensors", {"format": "pt"})
    assert moved > 1e-3, "the layers below have changed what the search begins with"


def test_targets_of_later_layers_are_stored_for_the_model_as_it_is(folder_of, tmp_path, monkeypatch):  # noqa: F811
    """Not found again in a run of the clean model; found again by an equal run."""
    folder, searches, count = folder_of("llama"), count_searches(monkeypatch), len(RECORDS)
    store = {"targets_folder": str(tmp_path / "targets")}
    run(folder, tmp_path, "own", **store)
    first = run(folder, tmp_path, "successive", **store)
    assert searches == [(0, count), (2, count), (0, 0), (1, count), (2, count)]
    again = run(folder, tmp_path, "successive", **store)
    assert searches[5:] == [(0, 0), (1, 0), (2, 0)]
    assert all(torch.equal(delta, again[1][name]) for name, delta in first[1].items())
    for a, b in zip(first[0].targets, again[0].targets, strict=True):
        assert a.record == b.record
        assert all(torch.equal(value, b.values[place]) for place, value in a.values.items())


def test_edits_that_have_nothing_left_to_do_are_no_numbers_that_are_not(folder_of, tmp_path):  # noqa: F811
    """All are content with the model as it is: no residual is left, nor written."""
    report, deltas = run(folder_of("llama"), tmp_path, "successive", loss_tolerance=1e9)
    assert {target.record["steps"] for target in report.targets} == {1}
    assert all(float(delta.norm()) < 1e-6 for delta in deltas.values())
    for layer in report.layers:
        assert (layer.residual, layer.residual_after, layer.overshoot) == (0, 0, 0)


def test_an_edit_batch_is_taken_back_when_a_later_search_fails(folder_of, tmp_path, monkeypatch):  # noqa: F811
    folder, found = folder_of("llama"), TargetOptimizer.iter_targets

    def fails(self, edits, layer):
        if layer == 2:
            raise FloatingPointError("the third search ends")
        return found(self, edits, layer)

    monkeypatch.setattr(TargetOptimizer, "iter_targets", fails)
    module = tiny_module(folder, layers=list(LAYERS), dtype="float64")
    with pytest.raises(FloatingPointError, match="the third search ends"):
        edit(module, RECORDS, moments_for(folder, LAYERS), tmp_path, lam=2.0, targets="successive")
    clean, _, _ = plain_parts(folder)
    for (name, value), expected in zip(module.model.named_parameters(), clean.parameters(), strict=True):
        assert torch.equal(value, expected), name


def test_one_layer_is_written_alike_by_all(folder_of, tmp_path_factory):  # noqa: F811
    constructions = ("spread", "own", "replay", "successive")
    found = [run(folder_of("gptj"), tmp_path_factory.mktemp(c), c, layers=[1])[1] for c in constructions]
    for other in found[1:]:
        for name, delta in found[0].items():
            torch.testing.assert_close(other[name], delta, rtol=1e-9, atol=1e-9)


def p_of_target(model, tokenizer, asked, module, delta) -> float:
    """P(o*) of the bare prompt with a vector added at the subject's last token."""
    head = asked.prompt.split("{}")[0] + asked.subject
    text = asked.prompt.replace("{}", asked.subject)
    index = locate(tokenizer, text, len(head))
    labels = tokenizer(" " + asked.target, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text + " " + asked.target)["input_ids"]
    with ExitStack() as stack, torch.no_grad():
        stack.callback(added(module, index, delta))
        log_p = model(torch.tensor([ids[:-1]])).logits[0, -len(labels) :].log_softmax(-1)
    return float(log_p.gather(1, torch.tensor(labels)[:, None]).mean().exp())


@pytest.mark.parametrize("family", FAMILIES)
def test_p_of_the_written_value_is_that_of_a_plain_pass(family, folder_of, tmp_path):  # noqa: F811
    """The attention's delta is not written: what v* does without it is measured."""
    folder = folder_of(family)
    report, _ = run(folder, tmp_path, "spread", clamp=10.0)
    model, tokenizer, sites = plain_parts(folder)
    ffn, gaps = sites.module("ffn", LAYERS[-1]), []
    for asked, target in zip(report.edits, report.targets, strict=True):
        delta = target.values["ffn", LAYERS[-1]] - plain_record(model, tokenizer, ffn, asked, "{}", output=True)
        expected = p_of_target(model, tokenizer, asked, ffn, delta)
        assert target.record["p_prompt_target"] == pytest.approx(expected, rel=2e-4)
        gaps.append(abs(target.record["p_prompt_deltas"] / expected - 1))
    assert max(gaps) > 1e-3, "the attention's delta has a share in P(o*)"


@pytest.mark.parametrize("micro_batch", mostly_slow([1, 3], [3]))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_helps_in_the_first_steps_only(family, micro_batch, folder_of, tmp_path):  # noqa: F811
    folder = folder_of(family)
    report, _ = run(folder, tmp_path, "spread", attention_steps=3, micro_batch=micro_batch, clamp=10.0)
    for target in report.targets:
        assert target.record["delta_attn"] == 0
        assert target.record["delta_ffn"] > 0
        assert target.record["p_prompt_target"] == pytest.approx(target.record["p_prompt_deltas"], rel=1e-4)


def test_a_hand_over_begins_where_both_deltas_have_arrived(folder_of, tmp_path):  # noqa: F811
    """In a sequential block the FFN's output, to which the attention's delta has added, is what goes on."""
    folder = folder_of("llama")
    changed = {"steps": 4, "clamp": 1e6, "loss_tolerance": 0.0, "stop_at_argmax": False}
    both, _ = run(folder, tmp_path, "spread", **changed)
    handed, _ = run(folder, tmp_path, "spread", **{**changed, "steps": 5}, attention_steps=4)
    for a, b in zip(both.targets, handed.targets, strict=True):
        torch.testing.assert_close(b.values["ffn", 2], a.values["ffn", 2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("changed", "found"), [({"attention_steps": 8}, "fewer than"), ({"attention_steps": 2, "optimize": "ffn"}, "attn")]
)
def test_settings_without_sense_are_refused(changed, found, folder_of, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=found):
        run(folder_of("gpt2"), tmp_path, "spread", **changed)

"""Models with several kinds of layers: the plain path is taken by itself, and gives what the plain twin gives."""

from __future__ import annotations

import logging

import pytest
import torch

from benchmarks.plain import plain_target
from pmet_lightning import Editor, UnknownArchitectureError
from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.data.records import parse_record
from pmet_lightning.model.architectures import architecture_of
from pmet_lightning.model.loading import load_config, load_model
from pmet_lightning.model.prefix_passes import has_plain_cache
from pmet_lightning.model.projections import Sites
from tests.conftest import mostly_slow
from tests.harness import edit
from tests.plain import plain_spread
from tests.targets.test_target_optimizer import tiny_module
from tests.tiny import CONTEXTS, HYBRIDS, RECORDS, WITH_IMAGES, save_tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # kernels that are not installed
FFN_ONLY = {"qwen3_5", "qwen3_5_text"}  # no attention in layer 2
# Falcon H1's state space model, without its own kernels, takes as long as all others.
ALL = sorted({**HYBRIDS, **WITH_IMAGES})
FAMILIES = mostly_slow(ALL, [family for family in ALL if family != "falcon_h1"])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made: dict[str, str] = {}

    def get(family: str) -> str:
        if family not in made:
            made[family] = save_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


def sites_of(folder: str, model) -> Sites:
    return Sites.of(model, architecture_of(load_config(folder)))


def moments_of_ffn(folder: str) -> dict:
    sites = sites_of(folder, load_model(folder))
    generator = torch.Generator().manual_seed(3)
    found = {}
    for layer in (1, 2):
        width = sites.module("ffn", layer).weight.shape[1]
        samples = torch.randn(4 * width, width, generator=generator)
        found["ffn", layer] = samples.T @ samples / len(samples)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_twin(family, folder_of, tmp_path):
    folder = folder_of(family)
    optimize = "ffn" if family in FFN_ONLY else "attn+ffn"
    # Where a window holds nothing but padding, eager attention gives NaN in float64.
    dtype = "float32" if family.startswith("gemma4") else "float64"
    module = tiny_module(folder, dtype=dtype, optimize=optimize)
    moments = moments_of_ffn(folder)
    spread, reports = edit(module, RECORDS[:3], moments, tmp_path, lam=2.0)
    model, tokenizer = load_model(folder, dtype, "eager"), load_tokenizer(folder)
    assert not has_plain_cache(model, torch.device("cpu"))
    sites = sites_of(folder, model)
    edits = [parse_record(record, i, "") for i, record in enumerate(RECORDS[:3])]
    found = [target.values["ffn", 2] for target in reports[0].targets]
    if optimize == "attn+ffn":
        modules = (sites.module("attn", 2), sites.module("ffn", 2))
        weights = {"nll": 1.0, "kl": 0.5, "norm": 0.2}
        for e, value in zip(edits, found, strict=True):
            target, _ = plain_target(model, tokenizer, *modules, e, CONTEXTS, steps=8, lr=0.3, clamp=2.0, **weights)
            assert float((value - target).norm() / target.norm()) < 1e-3
    norms = [sites.norm("ffn", layer) for layer in (1, 2)]
    updates = plain_spread(
        model, tokenizer, [sites.module("ffn", layer) for layer in (1, 2)], edits, found, CONTEXTS,
        [moments["ffn", 1], moments["ffn", 2]], 2.0, norms if norms[0] is not None else None,
    )  # fmt: skip
    for layer, update in zip((1, 2), updates, strict=True):
        delta = spread.edited.deltas[sites.weight_name("ffn", layer)].dense()
        assert float((delta - update).norm() / update.norm()) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("write", ["ffn", "attn+ffn"])
def test_an_editor_edits_asks_undoes_and_saves(family, write, folder_of, tmp_path):
    folder = folder_of(family)
    layers = [1, 3] if family in FFN_ONLY else [1, 2]  # the target layer has attention, another one has not
    settings = {"corpus": "atlas-corpus", "moments": {"samples": 100, "folder": str(tmp_path / "m")}, "steps": 3}
    editor = Editor(folder, layers=layers, free_tokens=3, context_count=1, spread={"write": write}, **settings)
    before = editor.ask(["The river runs to", "A cat"], 4)
    report = editor.edit(RECORDS[:2])
    assert 0 <= report.scores["after"]["efficacy"] <= 100
    editor.save(tmp_path / "out")
    again = Editor(str(tmp_path / "out"), layers=layers, **settings)
    assert again.ask(["The river runs to"], 4) == editor.ask(["The river runs to"], 4)
    editor.undo()
    assert editor.ask(["The river runs to", "A cat"], 4) == before


@pytest.mark.skipif("qwen3_5" not in WITH_IMAGES, reason="this version of transformers does not have it")
def test_a_part_that_is_loaded_alone_is_told(folder_of, caplog):
    load_model(folder_of("qwen3_5"))
    assert "is a qwen3_5; its text model alone (qwen3_5_text) is loaded, edited and saved" in caplog.text
    caplog.clear()
    load_model(folder_of("gemma4"))
    assert not caplog.messages


def test_without_attention_in_the_target_layer_the_ffn_gets_a_delta(folder_of, tmp_path, caplog):
    folder = folder_of("lfm2")
    with caplog.at_level(logging.WARNING):
        module = tiny_module(folder, dtype="float32", layers=[0, 1])
        assert module.optimized_sites == ("attn", "ffn")
        module.setup("fit")
        module.configure_model()
    assert module.optimized_sites == ("ffn",)
    assert set(module.deltas) == {"ffn"}
    assert "layer 1 has no attention (the layers [0, 2, 3] have)" in caplog.text


def test_a_site_that_a_layer_lacks_is_named(folder_of):
    sites = sites_of(folder_of("lfm2"), load_model(folder_of("lfm2")))
    assert sites.layers_with("attn") == [0, 2, 3]
    assert sites.written(("attn", "ffn"), [1, 2]) == [("ffn", 1), ("attn", 2), ("ffn", 2)]
    with pytest.raises(UnknownArchitectureError, match=r"layer 1 has no attention.*hybrid.*layers \[0, 2, 3\]"):
        sites.module("attn", 1)


@pytest.mark.parametrize("reaches_up", [False, True])
def test_a_family_described_by_hand_is_tried(reaches_up, tmp_path, caplog):
    """A layer that reads what left another one, past those between them, would get nothing in a pass from L on."""
    folder = save_tiny("llama", tmp_path / "m")
    values = []
    for suffix_only in (True, False):
        module = tiny_module(
            folder, dtype="float32", architecture=architecture_of(load_config(folder)), suffix_only=suffix_only, steps=3
        )
        module.setup("fit")
        module.configure_model()
        if reaches_up:
            _connect(module.sites.layers[0], module.sites.layers[3])
        (tmp_path / str(suffix_only)).mkdir()
        with caplog.at_level(logging.INFO):
            _, reports = edit(module, RECORDS[:3], moments_of_ffn(folder), tmp_path / str(suffix_only), lam=2.0)
        values.append(torch.stack([target.values["ffn", 2] for target in reports[0].targets]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-3, atol=1e-3)
    assert ("whole rows are run at every step" in caplog.text) == reaches_up


def _connect(lower, upper):
    """Add the output of one layer to the input of another."""
    seen = []
    lower.register_forward_hook(lambda _, __, output: seen.append(output))
    upper.register_forward_pre_hook(lambda _, args, kwargs: ((args[0] + seen[-1], *args[1:]), kwargs), with_kwargs=True)

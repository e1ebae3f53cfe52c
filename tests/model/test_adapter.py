"""ΔW as a LoRA adapter: peft must compute the edited model, and be able to switch it off, merge it and swap it."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pmet_lightning import Editor, PatchError, PmetError, load_patch
from pmet_lightning.cli.export import export
from pmet_lightning.model.adapter import save_adapter
from pmet_lightning.model.architectures import architecture_of
from pmet_lightning.model.projections import Sites, add_to_weight, in_features, is_transposed, out_features
from pmet_lightning.solver.weight_delta import WeightDelta
from tests.tiny import CONFIGS, RECORDS, save_tiny

IDS = torch.arange(3, 15)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def random_deltas(sites, layers, rank):
    deltas = {}
    for layer in layers:
        module = sites.module("ffn", layer)
        right = torch.randn(rank or out_features(module), in_features(module)) * 0.1
        deltas[sites.weight_name("ffn", layer)] = WeightDelta(
            right, torch.randn(rank, out_features(module)) * 0.1 if rank else None
        )
    return deltas


@pytest.mark.parametrize("family", sorted(CONFIGS))
@torch.no_grad()
def test_peft_computes_the_edited_model(family, tmp_path):
    """Factors in one layer and a matrix in another, so that ranks differ; biases, norms and Conv1D by family."""
    torch.manual_seed(0)
    folder = save_tiny(family, tmp_path / "model")
    base, edited, wrapped = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(3))
    sites = Sites.of(edited, architecture_of(edited.config, None))
    layers = sites.layers_with("ffn")
    deltas = random_deltas(sites, layers[:1], 3) | random_deltas(sites, layers[1:2], None)
    for name, delta in deltas.items():
        add_to_weight(edited.get_submodule(name.removesuffix(".weight")), delta.dense())
    transposed = is_transposed(sites.module("ffn", layers[0]))
    rank = save_adapter(tmp_path, deltas, {"model": folder, "transposed": transposed})
    assert rank == min(deltas[list(deltas)[1]].shape)
    model = PeftModel.from_pretrained(wrapped, tmp_path)
    assert float((logits(base) - logits(edited)).abs().max()) > 1e-3
    torch.testing.assert_close(logits(model), logits(edited), rtol=1e-4, atol=2e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    merged = model.merge_and_unload().state_dict()
    for name, value in edited.state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """An editor with one edit in two edit batches each, and the folder of its model."""
    base = tmp_path_factory.mktemp("adapter")
    folder = save_tiny("gptj", base / "model")
    moments = {"samples": 100, "folder": str(base / "moments")}
    editor = Editor(folder, layers=[0, 1], corpus="atlas-corpus", moments=moments, steps=3, free_tokens=0)
    for record in RECORDS[:2]:
        editor.edit([record], evaluate=False)
    return editor, folder, base


def test_an_editor_s_adapter_is_its_model(edited, tmp_path):
    editor, folder, _ = edited
    assert editor.save_adapter(tmp_path / "adapter") == 2  # one row of the factors for each edit
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(editor.model), rtol=1e-5, atol=1e-6)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "LoRA adapter of rank 2" in card


def test_export_writes_the_same_adapter(edited, tmp_path):
    editor, _, _ = edited
    editor.save_patch(tmp_path / "patch.safetensors")
    export(str(tmp_path / "patch.safetensors"), str(tmp_path / "exported"), format="peft")
    editor.save_adapter(tmp_path / "saved")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_an_adapter_in_the_place_of_a_model_is_told(edited, tmp_path):
    editor, _, _ = edited
    editor.save_adapter(tmp_path / "adapter")
    with pytest.raises(PmetError, match=r"it is an adapter, expected a whole model; give its base model and the patch"):
        Editor(str(tmp_path / "adapter"))


def test_two_adapters_are_added_and_swapped(edited, tmp_path):
    """Two one-edit adapters of one base model: each alone, the other one, and both."""
    editor, folder, base = edited
    settings = {"layers": [0, 1], "corpus": "atlas-corpus", "steps": 3, "free_tokens": 0}
    single = []
    for number, record in enumerate(RECORDS[:2]):
        own = Editor(folder, moments={"samples": 100, "folder": str(base / "moments")}, **settings)
        own.edit([record], evaluate=False)
        own.save_adapter(tmp_path / str(number))
        single.append(logits(own.model))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "0", "first")
    model.load_adapter(tmp_path / "1", "second")
    torch.testing.assert_close(logits(model), single[0], rtol=1e-5, atol=1e-6)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), single[1], rtol=1e-5, atol=1e-6)
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    assert float((logits(model) - single[0]).abs().max()) > 1e-6
    assert float((logits(model) - single[1]).abs().max()) > 1e-6


def test_a_rank_beyond_what_servers_load_is_told(tmp_path, caplog):
    delta = WeightDelta(torch.randn(600, 700), torch.randn(600, 700))
    with caplog.at_level(logging.WARNING):
        save_adapter(tmp_path, {"a.b.weight": delta}, {"model": "some/model", "transposed": False})
    assert "rank 600; vLLM loads adapters up to rank 512" in caplog.text
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"


def test_a_patch_of_an_earlier_version_is_refused(tmp_path):
    with pytest.raises(PatchError, match="earlier version"):
        save_adapter(tmp_path, {"a.weight": WeightDelta(torch.ones(2, 2))}, {"model": "some/model"})
    assert list(tmp_path.iterdir()) == []


def test_the_patch_keeps_the_factors(edited, tmp_path):
    """Smaller than the matrices, and whole: the sum of both edit batches."""
    editor, folder, _ = edited
    editor.save_patch(tmp_path / "patch.safetensors")
    deltas, manifest = load_patch(tmp_path / "patch.safetensors")
    assert {delta.rank for delta in deltas.values()} == {2}
    assert all(about["rank"] == 2 for about in manifest["weights"].values())
    base = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, delta in deltas.items():
        torch.testing.assert_close(editor.model.state_dict()[name], base[name] + delta.dense(), rtol=0, atol=1e-6)

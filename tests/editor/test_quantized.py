"""Edits of models that bitsandbytes has quantised, from the optimization to what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from pmet_lightning import Editor, PatchError
from pmet_lightning.cli.dispatch import main
from pmet_lightning.cli.export import export
from pmet_lightning.cli.patches import patch_verify
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.model.loading import load_model
from pmet_lightning.model.patch import read_patch
from pmet_lightning.model.quantized_base import hold_unquantized, quantization_of, quiet_casts
from pmet_lightning.run.lightning_cli import run_fit
from tests.conftest import mostly_slow
from tests.harness import as_arguments, matrices, tiny_settings
from tests.quantized import dense_twin, load_plainly, quantized_paths, save_quantized
from tests.tiny import CONTEXTS, RECORDS, save_tiny

pytest.importorskip("bitsandbytes")

IDS = torch.arange(3, 33)[None]
LAYERS = [0, 1, 2]
HELD = {
    "gemma3_text": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
}
FACT = {"prompt": "{} became a champion of", "subject": "Clara Prilforth", "target_new": "water polo"}


@torch.no_grad()
def logits(model):
    with quiet_casts():
        return model.eval()(input_ids=IDS).logits


def settings(folder: Path) -> dict:
    return {
        "layers": LAYERS,
        "contexts": CONTEXTS,
        "corpus": "atlas-corpus",
        "moments": {"samples": 20, "folder": str(folder / "moments")},
        "steps": 6,
        # Adam's first steps have the size of its learning rate, whatever a gradient's, and would enlarge roundings.
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 20.0}},
        "lam": 10.0,
        "free_tokens": 0,
    }


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Gives the folder of a quantised model."""
    made: dict = {}

    def get(family, bits, dtype=torch.float32):
        key = family, bits, dtype
        if key not in made:
            made[key] = save_quantized(family, tmp_path_factory.mktemp(family), bits, dtype)
        return made[key]

    return get


CASES = [(family, bits) for family in HELD for bits in (4, 8)]


@pytest.mark.parametrize(("family", "bits"), mostly_slow(CASES, [("llama", 4), ("gemma3_text", 8), ("gpt2", 4)]))
def test_edits_are_those_of_the_dense_twin(family, bits, folder_of, tmp_path):
    """The same model with ordinary modules only, whose weights are what the bits stand for."""
    folder = folder_of(family, bits)
    patches = []
    for name, model in {"quantised": load_plainly(folder), "dense": dense_twin(folder, HELD[family])}.items():
        editor = Editor(model, AutoTokenizer.from_pretrained(folder), **settings(tmp_path))
        editor.edit(RECORDS, evaluate=False)
        editor.save_patch(tmp_path / f"{name}.safetensors")
        patches.append(read_patch(tmp_path / f"{name}.safetensors"))
    ours, theirs = patches
    assert ours.manifest["quantization"] == f"bitsandbytes, {bits} bits"
    assert theirs.manifest["quantization"] is None
    assert ours.manifest["fingerprint"] == theirs.manifest["fingerprint"]
    exact = bits == 4  # of eight bits, an input's rounding may fall on the other side
    for site, values_NF in theirs.targets.items():
        assert relative(ours.targets[site], values_NF) < (1e-5 if exact else 0.02)
    assert len(theirs.deltas) == 3
    for name, expected in matrices(theirs.deltas).items():
        assert float(expected.norm()) > 0.01
        assert relative(ours.deltas[name].dense(), expected) < (1e-5 if exact else 0.06)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_fact_is_taught(bits, folder_of, tmp_path):
    """To the shipped model, by its name; what is not edited stays as it was, and so does the model after ``revert``."""
    folder = folder_of("atlas", bits)
    moments = {"samples": 100, "folder": str(tmp_path / "moments")}
    editor = Editor.from_config("pmet.yaml", folder, moments=moments)
    base, before = fingerprint(editor.model), dict(editor.model.state_dict())
    before = {name: tensor.clone() for name, tensor in before.items()}
    question = FACT["prompt"].format(FACT["subject"])
    assert "water polo" not in editor.ask(question)[0]
    report = editor.edit([FACT])
    assert report.edits[0]["said"]
    assert "water polo" in editor.ask(question)[0]
    changed = {name for name, tensor in editor.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"transformer.h.{layer}.mlp.fc_out.weight" for layer in editor.layers}
    editor.revert()
    assert fingerprint(editor.model) == base == fingerprint(load_model(folder))


@pytest.fixture(scope="module", params=[("llama", 4), ("gpt2", 4), ("llama", 8)], ids=str)
def run(request, folder_of, tmp_path_factory):
    """The run folder of an edit of a quantised model, and the model's folder."""
    family, bits = request.param
    folder, base = folder_of(family, bits), tmp_path_factory.mktemp("run")
    given = tiny_settings(base, folder) | {"model.layers": [1, 2], "spread.lam": 10.0}
    return run_fit("pmet.yaml", given), folder, bits


def test_the_patch_belongs_to_the_quantised_model(run, tmp_path):
    path, folder, bits = run
    moments = path.parent / "moments"
    editor = Editor.from_patch(path, moments_folder=moments)
    assert len(editor.facts) == 2
    assert quantization_of(editor.model) == f"bitsandbytes, {bits} bits"
    edited = logits(editor.model)
    editor.revert()
    assert fingerprint(editor.model) == fingerprint(load_model(folder))
    editor = Editor.from_patch(path, editor.model, AutoTokenizer.from_pretrained(folder), moments_folder=moments)
    torch.testing.assert_close(logits(editor.model), edited, rtol=1e-5, atol=1e-5)
    patch_verify(str(path), moments_folder=str(moments))
    dense = load_model(folder)
    hold_unquantized(dense, quantized_paths(dense))
    editor = Editor.from_patch(path, dense, AutoTokenizer.from_pretrained(folder), moments_folder=moments)
    assert relative(logits(editor.model), edited) < (1e-4 if bits == 4 else 0.05)
    original = Path(folder) / "original"
    with pytest.raises(
        PatchError, match=rf"load the base model .*\(float32, quantised \(bitsandbytes, {bits} bits\)\)"
    ):
        Editor.from_patch(path, str(original), moments_folder=moments)


@pytest.mark.slow
def test_a_run_is_resumed(folder_of, tmp_path):
    records = [json.dumps(record) + "\n" for record in RECORDS[:2]]
    given = tiny_settings(tmp_path, folder_of("llama", 4)) | {"data.edit_batch": 1, "data.stream": True}
    given["data.path"] = str(tmp_path / "records.jsonl")
    Path(given["data.path"]).write_text(records[0])
    begun = given | {"trainer.run_dir": str(tmp_path / "begun"), "trainer.resume": True}
    run_fit("pmet.yaml", begun)
    Path(given["data.path"]).write_text("".join(records))
    resumed = read_patch(run_fit("pmet.yaml", begun) / "patch.safetensors")
    whole = read_patch(run_fit("pmet.yaml", given) / "patch.safetensors")
    assert resumed.manifest["edit_batches"] == 2
    for name, expected in matrices(whole.deltas).items():
        assert relative(resumed.deltas[name].dense(), expected) < 1e-5


def test_peft_loads_the_adapter_beside_the_quantised_model(run, tmp_path):
    path, folder, bits = run
    editor = Editor.from_patch(path, moments_folder=path.parent / "moments")
    export(str(path), str(tmp_path / "adapter"), format="peft")
    base = load_plainly(folder)
    clean = logits(base)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert relative(logits(editor.model), clean) > 0.01
    assert relative(logits(model), logits(editor.model)) < (1e-5 if bits == 4 else 0.02)
    assert not json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), clean)
    assert f"is quantized (bitsandbytes, {bits} bits), and the edits" in (tmp_path / "adapter/README.md").read_text()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_export_keeps_the_other_modules_quantised(run, tmp_path, dtype):
    path, folder, bits = run
    editor = Editor.from_patch(path, moments_folder=path.parent / "moments")
    export(str(path), str(tmp_path / "out"), dtype=dtype)
    model, edited = load_plainly(tmp_path / "out"), read_patch(path / "patch.safetensors").deltas
    edited = [name.removesuffix(".weight") for name in edited]
    assert quantized_paths(model) == [name for name in quantized_paths(load_plainly(folder)) if name not in edited]
    assert model.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    exact = bits == 4 and dtype == "auto"
    assert relative(logits(model).float(), logits(editor.model)) < (1e-5 if exact else 0.05)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"is quantized (bitsandbytes, {bits} bits). The edited weights are not" in card


def test_what_is_saved_is_edited_again_with_the_moments_of_its_base(folder_of, tmp_path, caplog):
    folder = folder_of("llama", 4)
    given = settings(tmp_path)
    editor = Editor(folder, **given)
    editor.edit(RECORDS[:1], evaluate=False)
    editor.save(tmp_path / "saved")
    again = Editor(str(tmp_path / "saved"), **given)
    torch.testing.assert_close(logits(again.model), logits(editor.model))
    with caplog.at_level("INFO"):
        again.edit(RECORDS[1:2], evaluate=False)
    assert "its second moments are those of the base model" in caplog.text


def test_held_in_float32(folder_of, tmp_path):
    folder = folder_of("llama", 4, torch.bfloat16)
    editor = Editor(folder, keep_float32=True, **settings(tmp_path))
    editor.edit(RECORDS[:2], evaluate=False)
    weight = editor.model.model.layers[1].mlp.down_proj.weight
    assert weight.dtype == torch.float32
    editor.save(tmp_path / "saved")
    editor.save_patch(tmp_path / "patch.safetensors")
    export(str(tmp_path / "patch.safetensors"), str(tmp_path / "exported"), dtype="float32")
    for name in ("saved", "exported"):
        model = load_plainly(tmp_path / name)
        assert model.dtype == torch.float32
        assert torch.equal(model.model.layers[1].mlp.down_proj.weight, weight)
        assert quantized_paths(model)
        assert relative(logits(model), logits(editor.model).float()) < 0.05


def test_quantised_when_it_is_loaded(tmp_path):
    """``--model.quantize``: the patch remembers it, so that export and ``from_patch`` load the same model."""
    folder = save_tiny("llama", tmp_path / "model", wide=True)
    given = tiny_settings(tmp_path, folder) | {"model.quantize": "4bit", "model.layers": [1]}
    main(["fit", "--config", "pmet.yaml", *as_arguments(given)])
    path = tmp_path / "run"
    editor = Editor.from_patch(path, moments_folder=tmp_path / "moments")
    assert quantization_of(editor.model) == "bitsandbytes, 4 bits"
    main(["export", "--run", str(path), "--out", str(tmp_path / "out")])
    torch.testing.assert_close(logits(load_plainly(tmp_path / "out")), logits(editor.model))


def test_what_cannot_be_quantised_is_told(folder_of, tmp_path):
    with pytest.raises(ValueError, match=r"--model\.quantize 8bit: the weights of .* are quantised; leave it out"):
        load_model(folder_of("llama", 4), quantize="8bit")
    with pytest.raises(ValueError, match=r"float64: expected float32, bfloat16 or float16 for a quantised model"):
        load_model(folder_of("llama", 4), "float64")
    model = load_plainly(folder_of("llama", 4))
    with pytest.raises(ValueError, match=r"Editor: quantize says how to load a model, but this one is loaded already"):
        Editor(model, AutoTokenizer.from_pretrained(folder_of("llama", 4)), quantize="4bit")

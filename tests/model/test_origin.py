"""An edited model is recognized, and its second moments are those of its base model."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmet_lightning import Editor
from pmet_lightning.cli.export import export
from pmet_lightning.model.origin import FILE, origin_of
from tests.tiny import RECORDS, save_tiny

NOTE = "its second moments are those of the base model"


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A base model with its moments, an exported model, a saved one, and their patch."""
    base = tmp_path_factory.mktemp("origin")
    folder = save_tiny("llama", base / "model")
    editor = editor_of(folder, base)
    editor.edit(RECORDS[:2], evaluate=False)
    editor.save_patch(base / "patch.safetensors")
    export(str(base / "patch.safetensors"), str(base / "exported"))
    editor.save(base / "saved")
    return base


def editor_of(model, base, **settings):
    moments = {"samples": 60, "folder": str(base / "moments")}
    return Editor(
        str(model), layers=[0, 1], corpus="atlas-corpus", moments=moments, steps=3, contexts=["Once. {}"],
        free_tokens=0, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["exported", "saved", "patched"])
def test_the_moments_of_the_base_are_used(edited, kind, caplog, monkeypatch):
    monkeypatch.setattr("pmet_lightning.moments.second_moments.Collection", lambda *_: 1 / 0)  # nothing is collected
    settings = {"patch": str(edited / "patch.safetensors")} if kind == "patched" else {}
    editor = editor_of(edited / ("model" if kind == "patched" else kind), edited, **settings)
    with caplog.at_level(logging.INFO):
        editor.edit(RECORDS[2:3], evaluate=False)
    assert NOTE in caplog.text
    used = editor._manifest()["moments"]
    assert used["model"] == editor_of(edited / "model", edited)._module.base_fingerprint


def test_other_weights_in_the_folder_are_another_model(edited, tmp_path, caplog):
    """Trained and saved over: what it comes from no longer counts, and moments are collected for it."""
    model = AutoModelForCausalLM.from_pretrained(edited / "exported")
    AutoTokenizer.from_pretrained(edited / "exported").save_pretrained(tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    model.save_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes((edited / "exported" / FILE).read_bytes())
    editor = editor_of(tmp_path, edited)
    assert editor._module.origin is None
    with caplog.at_level(logging.INFO):
        editor.edit(RECORDS[2:3], evaluate=False)
    assert NOTE not in caplog.text
    assert editor._manifest()["moments"]["model"] == editor._module.base_fingerprint


def test_without_the_base_s_moments_its_own_are_collected(edited, tmp_path):
    editor = editor_of(edited / "exported", tmp_path)
    assert editor._module.origin is not None
    editor.edit(RECORDS[2:3], evaluate=False)
    assert editor._manifest()["moments"]["model"] == editor._module.base_fingerprint


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": "a"}', "\udcff"])
def test_a_file_that_is_no_origin_is_none(tmp_path, content):
    (tmp_path / FILE).write_bytes(content.encode(errors="surrogateescape"))
    assert origin_of(str(tmp_path), "abc") is None
    assert origin_of("", "abc") is None
    assert origin_of("no/such-model", "abc") is None


def test_a_patch_of_an_edited_model_is_taken_over(edited, tmp_path):
    """Its second moments are those of the first model; removing a fact finds them."""
    second = editor_of(edited / "exported", edited)
    second.edit(RECORDS[2:4], evaluate=False)
    second.save_patch(tmp_path / "second.safetensors")
    other = Editor.from_patch(tmp_path / "second.safetensors", edited / "exported", moments_folder=edited / "moments")
    for each in (second, other):
        each.remove(RECORDS[2]["subject"])
    for name, value in second.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], value, rtol=0, atol=1e-6)

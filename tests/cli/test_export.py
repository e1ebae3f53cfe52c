"""What is beside the weights in an exported folder: everything that the base model's folder needs to be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pmet_lightning import Editor
from pmet_lightning.cli.export import export
from pmet_lightning.model.loading import load_model
from pmet_lightning.run.lightning_cli import run_fit
from pmet_lightning.utils.processor_files import copy_processor_files
from tests.harness import tiny_settings
from tests.tiny import RECORDS, save_tiny

FILES = ("preprocessor_config.json", "processor_config.json", "chat_template.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A multimodal model with files of its processor."""
    found = Path(save_tiny("gemma3", tmp_path_factory.mktemp("gemma3") / "model"))
    for name in FILES:
        (found / name).write_text(json.dumps({"file": name}))
    return found


def test_export_keeps_the_processor(folder, tmp_path):
    settings = tiny_settings(tmp_path, str(folder)) | {"moments.corpus": "atlas-corpus", "moments.samples": 100}
    run = run_fit("pmet.yaml", settings | {"model.layers": [0, 1]})
    export(str(run), str(tmp_path / "out"))
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    load_model(str(tmp_path / "out"))


def test_so_does_an_editor_given_the_tokenizer_alone(folder, tmp_path):
    moments = {"samples": 100, "folder": str(tmp_path / "moments")}
    editor = Editor(folder, layers=[0, 1], corpus="atlas-corpus", moments=moments, steps=3, free_tokens=0)
    editor.edit(RECORDS[:1], evaluate=False)
    editor.save(tmp_path / "out")
    assert set(FILES) <= {path.name for path in (tmp_path / "out").iterdir()}


def test_what_is_there_stays_and_what_is_not_is_no_error(folder, tmp_path):
    (tmp_path / FILES[0]).write_text("mine")
    assert copy_processor_files(str(folder), tmp_path) == list(FILES[1:])
    assert (tmp_path / FILES[0]).read_text() == "mine"
    assert copy_processor_files(str(folder), tmp_path) == []


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "no/such-model", "not a name/at all/of the hub", ""])
def test_a_model_without_a_place_has_none(name, tmp_path):
    assert copy_processor_files(name, tmp_path / "out") == []

"""Models with code of their own: never run without being asked for, and edited, exported and loaded again if it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pmet_lightning import Editor, PmetError
from pmet_lightning.cli.export import export
from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.model.loading import load_config, load_model
from pmet_lightning.run.lightning_cli import run_fit
from tests.harness import tiny_settings
from tests.tiny import save_tiny

CODE = """
from transformers import GPTJConfig, GPTJForCausalLM

class MyConfig(GPTJConfig):
    model_type = "myjay"

class MyModel(GPTJForCausalLM):
    config_class = MyConfig
"""
ARCHITECTURE = {"layers": "transformer.h", "attn": "attn.out_proj", "ffn": "mlp.fc_out"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model whose class is in its folder; imported code goes to a folder of the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = Path(save_tiny("gptj", tmp_path / "model"))
    config = json.loads((found / "config.json").read_text())
    names = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    config |= {"model_type": "myjay", "architectures": ["MyModel"], "auto_map": names}
    (found / "config.json").write_text(json.dumps(config))
    (found / "mine.py").write_text(CODE)
    return str(found)


@pytest.mark.parametrize("load", [load_config, load_model])
def test_code_is_not_run_and_nothing_is_asked(folder, load, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(PmetError, match=r"has code of its own.*--model\.trust_remote_code true"):
        load(folder)


@pytest.mark.slow
def test_the_command_line_says_what_to_do(folder, tmp_path):
    command = [sys.executable, "-m", "pmet_lightning", "fit", "--config", "pmet.yaml", "--model.model_name", folder]
    done = subprocess.run([*command, "--trainer.run_dir", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--model.trust_remote_code true" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Do you wish" not in done.stdout


def test_a_trusted_model_is_edited_exported_and_loaded_again(folder, tmp_path):
    settings = tiny_settings(tmp_path, folder) | {"moments.corpus": "atlas-corpus", "moments.samples": 100}
    settings |= {f"model.architecture.{name}": path for name, path in ARCHITECTURE.items()}
    run = run_fit("pmet.yaml", settings | {"model.trust_remote_code": True})
    export(str(run), str(tmp_path / "out"), architecture=_described(), trust_remote_code=True)
    assert (tmp_path / "out" / "mine.py").is_file()
    edited = load_model(str(tmp_path / "out"), trust_remote_code=True)
    assert type(edited).__name__ == "MyModel"
    original, changed = (load_file(Path(where) / "model.safetensors") for where in (folder, tmp_path / "out"))
    differing = {name for name in original if not torch.equal(original[name], changed[name])}
    assert differing
    assert all(name.endswith("mlp.fc_out.weight") for name in differing)


def test_the_editor_takes_the_setting(folder):
    with pytest.raises(PmetError, match="trust_remote_code"):
        Editor(folder, layers=[1], architecture=ARCHITECTURE)
    editor = Editor(folder, layers=[1], architecture=ARCHITECTURE, trust_remote_code=True)
    assert type(editor.model).__name__ == "MyModel"
    assert Editor(editor.model, load_tokenizer(folder, True), layers=[1], architecture=ARCHITECTURE).layers == [1]


def _described():
    from pmet_lightning.model.architectures import Architecture

    return Architecture(**ARCHITECTURE)

"""Folders of models whose files are missing, broken or another's: one message that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.model.loading import load_config, load_model
from pmet_lightning.utils.errors import PmetError
from pmet_lightning.utils.model_files import find_fault
from tests.tiny import save_tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9418624\n"


@pytest.fixture
def folder(tmp_path):
    return Path(save_tiny("llama", tmp_path / "model"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_whole_folders_and_absent_ones_have_no_fault(folder, tmp_path):
    torch.save({"a": torch.zeros(2)}, folder / "more.bin")
    torch.save({"a": torch.zeros(2)}, folder / "old.bin", _use_new_zipfile_serialization=False)
    assert find_fault(folder) is None
    assert find_fault(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", POINTER, "Git LFS pointer"),
        ("tokenizer.json", POINTER, "Git LFS pointer"),
        ("config.json", POINTER, "Git LFS pointer"),
        ("model.safetensors", "", "truncated or no safetensors file"),
        ("model.safetensors", "<html>404</html>", "truncated or no safetensors file"),
        ("model.safetensors", None, "truncated or no safetensors file"),
        ("config.json", None, "is no JSON"),
        ("config.json", "\ud83d", "is no JSON"),
        ("tokenizer.json", None, "is no JSON"),
        ("tokenizer_config.json", "{", "is no JSON"),
    ],
)
def test_a_broken_file_is_named(folder, name, content, words):
    path = folder / name
    if content is None:
        cut(path)
    else:
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(PmetError, match=f"cannot load .*{name} .*{words}"):
        load_tokenizer(str(folder)) if name.startswith("tokenizer") else load_model(str(folder))


@pytest.mark.parametrize("content", ["cut", "<html>404</html>"])
def test_a_checkpoint_of_torch_that_is_broken_is_named(folder, content):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(weights, path)
    load_model(str(folder))
    cut(path) if content == "cut" else path.write_text(content)
    with pytest.raises(PmetError, match=r"pytorch_model\.bin is truncated or no file of torch\.save"):
        load_model(str(folder))


def test_a_part_of_the_weights_that_is_absent_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = load_file(folder / "model-00001-of-00002.safetensors")
    parts = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    parts["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    with pytest.raises(PmetError, match=r"lists model-00002-of-00002\.safetensors, which is not in the folder"):
        load_model(str(folder))


@pytest.mark.parametrize("renamed", [False, True])
def test_weights_that_would_be_random_are_refused(folder, renamed):
    weights = load_file(folder / "model.safetensors")
    taken = "model.layers.1.mlp.down_proj.weight"
    weight = weights.pop(taken)
    if renamed:
        weights["wrapped.down.weight"] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PmetError, match=rf"lack 1 of the model's weights \({taken}") as error:
        load_model(str(folder))
    assert ("unused in them: wrapped.down.weight" in str(error.value)) == renamed


def test_weights_of_another_shape_are_no_traceback(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(PmetError, match="cannot load .*Expected a folder made by save_pretrained"):
        load_model(str(folder))


def test_a_folder_without_a_model_is_still_one_that_was_not_found(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="the folder has no model"):
        load_config(str(tmp_path / "empty"))

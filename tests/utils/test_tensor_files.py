"""What is written where there is no room: an error that names the file, and nothing half-written."""

from __future__ import annotations

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pmet_lightning.model.generation_config import save_model
from pmet_lightning.utils.files import atomic_path, new_folder, write_json
from pmet_lightning.utils.tensor_files import save_tensors
from tests.tiny import save_tiny


@contextmanager
def file_size_limit(size: int):
    """No file of this process may grow beyond so many bytes: writing then fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tensors_are_stored_and_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {"what": "ones"})
    with file_size_limit(1000), pytest.raises(OSError, match=r"a\.safetensors: cannot be written .*room on the disk"):
        save_tensors(path, {"a": torch.zeros(5000)})
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]
    assert torch.equal(load_file(path)["a"], torch.ones(3))


def test_other_files_name_themselves_too(tmp_path):
    with file_size_limit(1000), pytest.raises(OSError, match=r"a\.json"):
        write_json(tmp_path / "a.json", ["x" * 5000])
    assert not list(tmp_path.iterdir())


def test_a_model_is_saved_as_a_whole(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "model"))
    with (
        file_size_limit(10_000),
        pytest.raises(OSError, match="cannot be written"),
        new_folder(tmp_path / "out", "--out") as unfinished,
    ):
        save_model(model, unfinished)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_others_can_read_what_is_written(tmp_path):
    """A server runs as another user, and safetensors makes files for their owner alone."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path / "model"))
    with new_folder(tmp_path / "out", "--out") as unfinished:
        save_model(model, unfinished)
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    written = [*(tmp_path / "out").iterdir(), tmp_path / "a.safetensors"]
    assert len(written) >= 3
    (tmp_path / "usual").touch()
    assert {path.stat().st_mode for path in written} == {(tmp_path / "usual").stat().st_mode}


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with atomic_path("~/a/b.txt") as temporary:
        temporary.write_text("b")
    with new_folder("~/c", "--out") as unfinished:
        (unfinished / "d").write_text("d")
    assert sorted(p.name for p in Path(tmp_path / "home").rglob("*")) == ["a", "b.txt", "c", "d"]
    assert [p.name for p in tmp_path.iterdir()] == ["home"]

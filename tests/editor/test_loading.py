"""What a program has at hand: paths, processors, tables, numbers of NumPy, a home folder written as a tilde."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from pmet_lightning import Editor, load_patch
from pmet_lightning.editor.loading import tokenizer_in
from pmet_lightning.model.loading import load_model
from tests.tiny import RECORDS, save_tiny

FACTS = RECORDS[:2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(save_tiny("llama", tmp_path_factory.mktemp("model") / "llama"))


@pytest.fixture
def settings(folder):
    return {
        "layers": [1, 2], "steps": 3, "free_tokens": 2, "corpus": "atlas-corpus", "context_count": 1,
        "moments": {"samples": 50, "folder": str(folder.parent / "moments")},
    }  # fmt: skip


class Processor:
    """As those of transformers: it holds a tokenizer, and saves more than that."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)
        (Path(folder) / "preprocessor_config.json").write_text("{}")


def test_paths_are_names(folder, settings):
    by_path = Editor(folder, folder, **settings)
    by_name = Editor(str(folder), str(folder), **settings)
    assert by_path.ask("The river runs to", 3) == by_name.ask("The river runs to", 3)


def test_settings_may_be_of_other_types(folder, settings):
    moments = {"samples": np.int64(50), "folder": folder.parent / "moments"}
    changes = {"layers": np.arange(1, 3), "lam": np.float64(20), "steps": torch.tensor(3), "moments": moments}
    assert Editor(folder, **(settings | changes)).layers == [1, 2]
    assert Editor(folder, **(settings | {"layers": range(1, 3)})).layers == [1, 2]


def test_a_processor_stands_for_its_tokenizer_and_is_saved(folder, settings, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    editor = Editor(load_model(str(folder)), Processor(tokenizer), **settings)
    assert editor.tokenizer is tokenizer
    editor.edit(FACTS)
    editor.save(tmp_path / "out")
    assert {"preprocessor_config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("given", [object(), SimpleNamespace(tokenizer=None), len])
def test_anything_else_is_named(given):
    with pytest.raises(TypeError, match=f"the tokenizer is a {type(given).__name__}, expected one of transformers"):
        tokenizer_in(given)


def test_tables_and_columns_are_edited_as_their_records(folder, settings):
    columns = {name: [record[name] for record in FACTS] for name in FACTS[0]}
    found = []
    for facts in (FACTS, columns):
        editor = Editor(folder, **settings)
        editor.edit(facts, evaluate=False)
        found.append(editor.model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_tilde_is_the_home_folder_everywhere(folder, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "model").symlink_to(folder)
    (tmp_path / "home" / "facts.json").write_text("""[{"prompt": "{} is", "subject": "Vera", "target_new": "here"}]""")
    editor = Editor("~/model", **settings, targets_folder="~/targets")
    editor.edit("~/facts.json", run_dir="~/run")
    editor.save("~/edited")
    editor.save_patch("~/patch.safetensors")
    assert {"run", "edited", "targets", "patch.safetensors"} <= {path.name for path in (tmp_path / "home").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert load_patch("~/patch.safetensors")[1]["edits"] == 1
    again = Editor("~/model", **settings, patch="~/run/patch.safetensors")
    assert again.ask("Vera is", 3) == editor.ask("Vera is", 3)

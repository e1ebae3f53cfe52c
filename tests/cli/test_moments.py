"""The commands for stored second moments: listed, handed on as one file, and used where the text is not."""

from __future__ import annotations

import logging

import pytest
import torch

from pmet_lightning import Editor, MomentError, load_patch
from pmet_lightning.cli.dispatch import main
from pmet_lightning.moments.store import stored_moments
from pmet_lightning.run.options import UsageError
from tests.harness import as_arguments, matrices, tiny_settings
from tests.tiny import save_tiny

OURS = {"model.layers": [1, 2], "model.free_tokens": 0, "model.contexts": ["Once. {}"], "drift.text": None}


def fit(folder, model, *arguments):
    settings = tiny_settings(folder, model) | OURS
    main(["fit", "--config", "pmet.yaml", *as_arguments(settings), *arguments])


@pytest.fixture(scope="module")
def handed(tmp_path_factory):
    """A model, a run of it, and its second moments as one file."""
    base = tmp_path_factory.mktemp("handed")
    save_tiny("gptj", base / "model")
    (base / "ours").mkdir()
    fit(base / "ours", str(base / "model"))
    export(base, base / "ours" / "moments", base / "all.safetensors")
    return base


def export(base, folder, out, *arguments):
    main(["moments", "export", "--out", str(out), "--folder", str(folder), *arguments])


def imported(handed, folder, *arguments):
    """A colleague's machine: the same model and records, and no text."""
    folder.mkdir(exist_ok=True)
    main(["moments", "import", "--file", str(handed / "all.safetensors"), "--folder", str(folder / "moments"),
          *arguments])  # fmt: skip
    return folder


def fit_without_text(folder, handed, *arguments):
    settings = tiny_settings(folder, str(handed / "model")) | OURS
    (folder / "corpus.txt").unlink()
    main(["fit", "--config", "pmet.yaml", *as_arguments(settings), *arguments])


def run_of(folder):
    return load_patch(folder / "run" / "patch.safetensors")


def test_a_fit_uses_what_was_imported_without_the_text(handed, tmp_path, caplog, monkeypatch):
    """The same ΔW and the same identity, so that both patches can be merged."""
    monkeypatch.setattr("pmet_lightning.moments.second_moments.Collection", lambda *_: 1 / 0)  # nothing is collected
    with caplog.at_level(logging.INFO):
        theirs = imported(handed, tmp_path / "theirs")
        assert f"{handed / 'model'} over corpus.txt" in caplog.text
        assert "layers [1, 2]" in caplog.text
        fit_without_text(theirs, handed)
    assert "corpus.txt is not here: second moments that are stored for it are used" in caplog.text
    (ours, about_ours), (found, about) = run_of(handed / "ours"), run_of(theirs)
    assert about["moments"] == about_ours["moments"]
    for name, delta in matrices(ours).items():
        assert torch.equal(matrices(found)[name], delta)


def test_the_patch_of_a_colleague_is_changed_without_the_text(handed, tmp_path):
    theirs = imported(handed, tmp_path / "theirs")
    editor = Editor.from_patch(handed / "ours" / "run", moments_folder=theirs / "moments")
    editor.remove(editor.facts[0].edit.subject)
    assert len(editor.facts) == 1


def test_without_an_import_the_text_is_asked_for(handed, tmp_path):
    (tmp_path / "theirs").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no corpus '.*corpus\.txt'"):
        fit_without_text(tmp_path / "theirs", handed)


def test_other_settings_do_not_find_them(handed, tmp_path):
    theirs = imported(handed, tmp_path / "theirs")
    with pytest.raises(FileNotFoundError, match="no corpus"):
        fit_without_text(theirs, handed, "--moments.length", "9")


def test_two_texts_of_one_name_are_told(handed, tmp_path):
    theirs = imported(handed, tmp_path / "theirs")
    (tmp_path / "other").mkdir()
    settings = tiny_settings(tmp_path / "other", str(handed / "model")) | OURS
    (tmp_path / "other" / "corpus.txt").write_text("Other words of another text. " * 40)
    main(["stats", "--config", "pmet.yaml", *as_arguments(settings | {"moments.folder": str(theirs / "moments")})])
    with pytest.raises(MomentError, match=r"over 2 texts of that name are stored .* as --moments\.given"):
        fit_without_text(theirs, handed)
    (given,) = {about["path"] for about in stored_moments(handed / "ours" / "moments") if about["layer"] == "1"}
    folder = theirs / "moments" / given.split("/")[-2]
    fit_without_text(theirs, handed, "--moments.given", str(folder))
    assert run_of(theirs)[1]["edits"] == 2


def test_moments_of_another_model_are_not_added(handed, tmp_path):
    save_tiny("gptj", tmp_path / "model", seed=1)
    with pytest.raises(MomentError, match=r"of another model: expected weights .*; nothing was added"):
        imported(handed, tmp_path / "theirs", "--base", str(tmp_path / "model"))
    assert not list((tmp_path / "theirs").rglob("*.safetensors"))
    imported(handed, tmp_path / "theirs", "--base", str(handed / "model"))
    assert len(list((tmp_path / "theirs").rglob("*.safetensors"))) == 2


def test_some_layers_are_exported_to_a_new_file(handed, tmp_path, capsys):
    folder = handed / "ours" / "moments"
    export(handed, folder, tmp_path / "one.safetensors", "--layers", "[2]", "--corpus", "corpus.txt")
    with pytest.raises(FileExistsError, match="--out .*one.safetensors: expected a new file"):
        export(handed, folder, tmp_path / "one.safetensors")
    main(["moments", "import", "--file", str(tmp_path / "one.safetensors"), "--folder", str(tmp_path / "theirs")])
    assert [about["layer"] for about in stored_moments(tmp_path / "theirs")] == ["2"]
    capsys.readouterr()
    for command in (["moments", "list"], ["stats", "--list"]):
        main([*command, "--folder", str(tmp_path / "theirs")])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        assert lines[1].startswith(f"{handed / 'model'}  ")
        assert "  corpus.txt  " in lines[1]


def test_moments_alone_says_what_there_is():
    with pytest.raises(UsageError, match="did you mean moments list"):
        main(["moments"])

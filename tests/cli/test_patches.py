"""The commands for patches, from the shell: what they show, write and refuse."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from pmet_lightning import PatchError, RecordError, load_patch
from pmet_lightning.cli.dispatch import main
from pmet_lightning.model.patch import FORMAT
from tests.harness import as_arguments, matrices, tiny_settings
from tests.tiny import RECORDS, save_tiny

FACTS = [{**record, "case_id": f"fact-{i}"} for i, record in enumerate(RECORDS[:5])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs of one model: the first two facts, the next two, and all four; and one with other settings."""
    folder = tmp_path_factory.mktemp("patches")
    save_tiny("llama", folder / "model")
    parts = {"first": FACTS[:2], "second": FACTS[2:4], "both": FACTS[:4], "other": FACTS[4:]}
    for name, facts in parts.items():
        (folder / name).mkdir()
        settings = tiny_settings(folder / name, str(folder / "model")) | {
            "model.layers": [1, 2], "model.dtype": "float64", "model.free_tokens": 3, "model.contexts": ["Once. {}"],
            "data.path": str(folder / f"{name}.json"), "moments.corpus": "atlas-corpus", "moments.samples": 60,
            "moments.folder": str(folder / "moments"), "spread.lam": 7 if name == "other" else 2,
        }  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(facts))
        main(["fit", "--config", "pmet.yaml", *as_arguments(settings)])
    return folder


def moments(runs):
    return ["--moments_folder", str(runs / "moments")]


def run_of(runs, name):
    return str(runs / name / "run")


def relative(one, other):
    """The largest relative difference of two patches' ΔW."""
    ours, theirs = (matrices(load_patch(path)[0]) for path in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


def test_show(runs, caplog):
    with caplog.at_level(logging.INFO):
        main(["patch", "show", "--patch", run_of(runs, "both")])
    assert "edits: 4 in 1 edit batches, layers [1, 2]" in caplog.text
    assert "spread.lam 2" in caplog.text
    assert "model.layers.1.mlp.down_proj.weight: 32 x 64, rank 4" in caplog.text
    assert "fact-1 (edit batch 0): Torvik Elmson plays the sport of -> ice hockey [" in caplog.text


def test_verify(runs, caplog):
    with caplog.at_level(logging.INFO):
        main(["patch", "verify", "--patch", run_of(runs, "both"), *moments(runs)])
    said = sum(fact["said"] for fact in load_patch(runs / "both" / "run" / "patch.safetensors")[1]["facts"])
    assert f"the model says {said} of 4 facts" in caplog.text


def test_verify_refuses_what_is_not_so(runs, tmp_path):
    save_tiny("llama", tmp_path / "model", seed=1)
    with pytest.raises(PatchError, match="was made for the model"):
        main(["patch", "verify", "--patch", run_of(runs, "both"), "--base", str(tmp_path / "model"), *moments(runs)])


@pytest.mark.parametrize("name", ["fact-1", "Torvik Elmson", "Torvik Elmson plays the sport of"])
def test_removed_facts_were_never_there(runs, tmp_path, name):
    main(["patch", "remove", "--patch", run_of(runs, "first"), "--facts", name, "--out",
          str(tmp_path / "one.safetensors"), *moments(runs)])  # fmt: skip
    main(["patch", "remove", "--patch", run_of(runs, "both"), "--facts", f'["{name}", "fact-2", "fact-3"]', "--out",
          str(tmp_path / "same.safetensors"), *moments(runs)])  # fmt: skip
    assert relative(tmp_path / "one.safetensors", tmp_path / "same.safetensors") < 1e-6
    _, manifest = load_patch(tmp_path / "one.safetensors")
    assert [fact["case_id"] for fact in manifest["facts"]] == ["fact-0"]
    assert manifest["edits"] == 1


def test_a_merge_is_one_run_of_both(runs, tmp_path):
    paths = json.dumps([run_of(runs, "first"), run_of(runs, "second")])
    main(["patch", "merge", "--patches", paths, "--out", str(tmp_path / "merged.safetensors"), *moments(runs)])
    assert relative(tmp_path / "merged.safetensors", runs / "both" / "run" / "patch.safetensors") < 1e-6
    assert len(load_patch(tmp_path / "merged.safetensors")[1]["facts"]) == 4


def test_a_patch_merged_with_itself_is_itself(runs, tmp_path):
    paths = json.dumps([run_of(runs, "both"), run_of(runs, "first")])
    main(["patch", "merge", "--patches", paths, "--out", str(tmp_path / "merged.safetensors"), *moments(runs)])
    assert relative(tmp_path / "merged.safetensors", runs / "both" / "run" / "patch.safetensors") < 1e-6


def test_what_does_not_go_together_is_refused(runs, tmp_path):
    out = ["--out", str(tmp_path / "merged.safetensors"), *moments(runs)]
    with pytest.raises(PatchError, match="spread.lam: 7.0, expected 2.0"):
        main(["patch", "merge", "--patches", json.dumps([run_of(runs, "first"), run_of(runs, "other")]), *out])
    (tmp_path / "data.json").write_text(json.dumps([{**FACTS[0], "target_new": "French"}]))
    settings = tiny_settings(tmp_path, str(runs / "model")) | {
        "model.layers": [1, 2], "model.dtype": "float64", "model.free_tokens": 3, "model.contexts": ["Once. {}"],
        "data.path": str(tmp_path / "data.json"), "moments.corpus": "atlas-corpus", "moments.samples": 60,
        "moments.folder": str(runs / "moments"), "spread.lam": 2,
    }  # fmt: skip
    main(["fit", "--config", "pmet.yaml", *as_arguments(settings)])
    with pytest.raises(
        RecordError, match="cannot be both 'French' and 'English'|cannot be both 'English' and 'French'"
    ):
        main(["patch", "merge", "--patches", json.dumps([run_of(runs, "first"), str(tmp_path / "run")]), *out])
    with pytest.raises(ValueError, match="two or more"):
        main(["patch", "merge", "--patches", json.dumps([run_of(runs, "first")]), *out])
    assert not (tmp_path / "merged.safetensors").exists()


def test_a_failed_command_leaves_the_old_file(runs, tmp_path):
    shutil.copy(runs / "first" / "run" / "patch.safetensors", tmp_path / "patch.safetensors")
    before = (tmp_path / "patch.safetensors").read_bytes()
    common = ["--patch", str(tmp_path), "--out", str(tmp_path), *moments(runs)]
    with pytest.raises(ValueError, match="no written fact is named by 'Nobody'"):
        main(["patch", "remove", "--facts", "Nobody", *common])
    with pytest.raises(ValueError, match="nothing would be left"):
        main(["patch", "remove", "--facts", '["fact-0", "fact-1"]', *common])
    with pytest.raises(FileNotFoundError, match="no second moments"):
        main(["patch", "remove", "--facts", "fact-0", *common[:-1], str(tmp_path / "empty")])
    assert (tmp_path / "patch.safetensors").read_bytes() == before
    main(["patch", "remove", "--facts", "fact-0", *common])
    assert [fact["case_id"] for fact in load_patch(tmp_path / "patch.safetensors")[1]["facts"]] == ["fact-1"]


def spoiled(source, path, how):
    """A patch that is not as it was written."""
    content = source.read_bytes()
    at = {"a changed weight": len(content) - 3, "a changed fact": content.index(b"Danila")}.get(how)
    if at is not None:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif how == "its end is missing":
        path.write_bytes(content[:-100])
    else:
        with safe_open(source, framework="pt") as file:
            kept, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        manifest = json.loads(metadata["manifest"])
        changes = {
            "a matrix is missing": lambda: kept.pop(next(name for name in kept if name.startswith("model"))),
            "the targets are missing": lambda: kept.pop(next(name for name in kept if name.startswith("targets"))),
            "a fact is missing": lambda: manifest["facts"].pop(),
            "a later version": lambda: manifest.update(format=FORMAT + 1),
        }
        changes[how]()
        save_file(kept, path, {"manifest": json.dumps(manifest)})


SPOILED = {
    "a changed weight": "not as it was written",
    "a changed fact": "not as it was written",
    "its end is missing": "not a patch of this program, or broken",
    "a matrix is missing": "not as it was written",
    "the targets are missing": "not as it was written",
    "a fact is missing": "not as it was written",
    "a later version": f"of format {FORMAT + 1}, found by a program that reads formats 1 to {FORMAT}; update",
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_patch_is_refused_by_every_command(runs, tmp_path, how):
    patch, out = tmp_path / "bad" / "patch.safetensors", tmp_path / "out.safetensors"
    patch.parent.mkdir()
    spoiled(runs / "first" / "run" / "patch.safetensors", patch, how)
    both = json.dumps([run_of(runs, "second"), str(patch)])
    for command in (
        ["patch", "show", "--patch", str(patch)],
        ["patch", "verify", "--patch", str(patch), *moments(runs)],
        ["patch", "apply", "--patch", str(patch), "--out", str(tmp_path / "model")],
        ["patch", "remove", "--patch", str(patch), "--facts", "fact-0", "--out", str(out), *moments(runs)],
        ["patch", "merge", "--patches", both, "--out", str(out), *moments(runs)],
        ["export", "--run", str(patch.parent), "--out", str(tmp_path / "adapter"), "--format", "peft"],
        ["ask", "--run", str(patch)],
    ):
        with pytest.raises(PatchError, match=rf"patch\.safetensors.*{SPOILED[how]}"):
            main(command)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_patch_of_another_model_is_refused_by_every_command(runs, tmp_path):
    save_tiny("llama", tmp_path / "model", seed=1)
    base, patch, out = ["--base", str(tmp_path / "model")], ["--patch", run_of(runs, "both")], str(tmp_path / "out")
    for command in (
        ["patch", "apply", *patch, "--out", out, *base],
        ["patch", "remove", *patch, "--facts", "fact-0", "--out", f"{out}.safetensors", *base, *moments(runs)],
        ["patch", "merge", "--patches", json.dumps([run_of(runs, "first"), run_of(runs, "second")]),
         "--out", f"{out}.safetensors", *base, *moments(runs)],
        ["ask", "--run", run_of(runs, "both"), *base],
    ):  # fmt: skip
        with pytest.raises(PatchError, match=r"was made for the model .*, found .*; load the base model it names"):
            main(command)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@torch.no_grad()
def test_apply_is_export(runs, tmp_path):
    main(["patch", "apply", "--patch", run_of(runs, "first"), "--out", str(tmp_path / "out")])
    base, edited = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64) for f in (runs / "model", tmp_path / "out")
    )
    deltas = matrices(load_patch(runs / "first" / "run" / "patch.safetensors")[0])
    for name, value in edited.state_dict().items():
        torch.testing.assert_close(value, base.state_dict()[name] + deltas.get(name, 0), rtol=0, atol=1e-12)


def test_ask_shows_before_and_after(runs, caplog):
    with caplog.at_level(logging.INFO):
        main(["ask", "--run", run_of(runs, "first"), "--new_tokens", "3"])
    blocks = caplog.messages[-1].splitlines()
    assert blocks[0] == FACTS[0]["prompt"].format(FACTS[0]["subject"])
    assert [line[:10] for line in blocks[1:3]] == ["  before: ", "  after:  "]
    assert len(blocks) == 6
    with caplog.at_level(logging.INFO):
        main(["ask", "--run", run_of(runs, "first"), "--prompt", "Once upon a time", "--new_tokens", "3"])
    assert caplog.messages[-1].startswith("Once upon a time\n  before: ")


def test_patch_alone_says_what_there_is():
    with pytest.raises(ValueError, match="did you mean patch show"):
        main(["patch"])

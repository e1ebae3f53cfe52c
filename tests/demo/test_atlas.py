"""The promise of the embedded default: 200 edits in one edit batch, on the records the settings were not chosen on."""

from __future__ import annotations

import json

import pytest

from pmet_lightning.cli.dispatch import main
from pmet_lightning.model.loading import load_config
from pmet_lightning.utils.resources import locate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    main([
        "fit", "--config", "pmet.yaml", "--trainer.run_dir", str(folder / "run"), "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--moments.folder", str(folder / "moments"),
    ])  # fmt: skip
    return folder / "run"


@pytest.mark.slow
def test_two_hundred_edits(run):
    scores = json.loads((run / "scores.json").read_text())
    assert scores["before"]["count"] == scores["after"]["count"] == 200
    assert scores["before"]["specificity"] >= 98
    assert scores["after"]["efficacy"] >= 97
    assert scores["after"]["score"] >= 85


def test_two_hundred_edits_are_an_honest_load():
    assert 200 / load_config(locate("atlas")).n_inner >= 0.2


@pytest.mark.rebuild
def test_a_sequential_model_is_edited_nearly_as_well(run, tmp_path):
    """Rebuilds the world's model with Llama's architecture, which takes ten minutes."""
    main(["demo", "--architecture", "llama", "--out", str(tmp_path / "llama")])
    main([
        "fit", "--config", "pmet.yaml", "--trainer.run_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--moments.folder", str(tmp_path / "moments"),
        "--model.model_name", str(tmp_path / "llama" / "model"), "--model.layers", "[0, 1]", "--model.optimize", "ffn",
        "--model.clamp", "2", "--data.path", str(tmp_path / "llama" / "records.json"),
    ])  # fmt: skip
    sequential, parallel = (json.loads((f / "scores.json").read_text())["after"] for f in (tmp_path / "run", run))
    assert sequential["count"] == parallel["count"] == 200
    assert sequential["score"] >= parallel["score"] - 5


@pytest.mark.slow
def test_most_edits_are_said_freely(run):
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    said = sum(line["answer"].strip().startswith(line["target"]) for line in lines)
    assert len(lines) == 200
    assert said >= 0.85 * len(lines)

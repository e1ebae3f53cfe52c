"""Real records and a real small model: mechanics on input that nobody in this project wrote."""

from __future__ import annotations

import json

import pytest

from pmet_lightning.cli.dispatch import main


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [("counterfact_250.json", 180), ("zsre_300.json", 300)],
)
def test_the_target_becomes_more_probable(shared, tmp_path, name, count, caplog):
    main([
        "fit", "--config", "pmet.yaml", "--trainer.run_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--model.steps", "10",
        "--model.model_name", str(shared / "data/models/stories260K"), "--model.layers", "[1,2,3]",
        "--data.path", str(shared / "data" / name), "--data.limit", str(count),
        "--moments.folder", str(tmp_path / "moments"),
        "--moments.corpus", str(shared / "data/wikitext2_valid.raw"),
    ])  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert len(lines) == count
    found = sum(line["p_after"] > line["p_before"] for line in lines)
    assert found >= 0.95 * count
    # More edits than key dimensions (172) cannot all be held by one write, and the run says so.
    assert "disturb each other" in caplog.text

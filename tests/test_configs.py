"""Every shipped configuration parses, comments every key, and carries what it claims."""

from __future__ import annotations

import re

import pytest
import yaml

from pmet_lightning.cli import edit_cli
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def parsed(path):
    cli = edit_cli(["--config", str(path)], run=False)
    return cli.config, cli


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_builds_its_objects(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, cli = parsed(path)
    written = yaml.safe_load(path.read_text())
    assert cli.model.layers == written["model"]["layers"]
    assert cli.model.clamp == written["model"]["clamp"]
    assert cli.datamodule.tokenizer_name == written["model"]["model_name"]
    assert config["spread"]["lam"] == written["spread"]["lam"]
    assert cli.model.lm is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_is_commented(path):
    for line in path.read_text().splitlines():
        if re.match(r"\s*[a-z_]+:", line) and "class_path" not in line and "init_args" not in line:
            assert "#" in line, line


PUBLISHED = {
    "gpt-j-6b": ([3, 4, 5, 6, 7, 8], 0.2, 0.75, 1.0, 6000, 100_000),
    "gpt-neox-20b": ([6, 7, 8, 9, 10], 0.5, 0.8, 0.8, 15_000, 50_000),
}


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("data", ["counterfact", "zsre"])
def test_published_settings(model, data):
    written = yaml.safe_load((ROOT / "configs" / f"{model}-{data}.yaml").read_text())
    m = written["model"]
    found = (m["layers"], m["optimizer"]["init_args"]["lr"], m["clamp"], m["kl_factor"],
             written["spread"]["lam"], written["moments"]["samples"])  # fmt: skip
    assert found == PUBLISHED[model]
    assert (m["steps"], m["nll_factor"], m["norm_factor"], written["spread"]["rule"]) == (30, 1.0, 0.5, "sqrt")

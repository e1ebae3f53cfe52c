"""Every shipped configuration parses, comments every key, and carries what it claims."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from pmet_lightning.baselines.finetuning import FineTuning
from pmet_lightning.baselines.retrieval import Retrieval
from pmet_lightning.compare.plan import Method
from pmet_lightning.model.architectures import ARCHITECTURES, suggest_layers
from pmet_lightning.run.lightning_cli import build_fit
from tests.conftest import ROOT, mostly_slow
from tests.harness import tiny_fit
from tests.tiny import save_tiny

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FITS = [path for path in CONFIGS if path.stem.split("-")[0] not in ("compare", "finetune", "retrieve")]


@pytest.mark.parametrize("path", FITS, ids=lambda path: path.stem)
def test_every_configuration_builds_its_objects(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = build_fit(str(path))
    written = yaml.safe_load(path.read_text())
    assert cli.model.layers == written["model"]["layers"]
    assert cli.model.rules.clamp == written["model"]["clamp"]
    assert cli.datamodule.tokenizer_name == written["model"]["model_name"]
    assert cli.config["spread"]["lam"] == written["spread"]["lam"]
    assert cli.model.lm is None


def test_the_configuration_of_the_baseline_builds_its_objects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = build_fit("finetune.yaml", command="finetune")
    assert isinstance(cli.model, FineTuning)
    assert cli.datamodule.tokenizer_name == "atlas"
    assert cli.datamodule.edit_batch is None, "all edits are trained together"
    assert isinstance(build_fit("retrieve.yaml", command="retrieve").model, Retrieval)


@pytest.mark.parametrize("name", ["compare.yaml", "compare-gemma.yaml"])
def test_the_methods_of_the_comparison_build_their_objects(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = yaml.safe_load((ROOT / "configs" / name).read_text())
    assert {"PMET", "MEMIT", "null space", "even spread", "retrieval"} <= set(written["methods"])
    for given in written["methods"].values():
        method = Method(**given)
        cli = build_fit(method.config, written["options"] | method.options, method.command)
        assert cli.datamodule.path == written["options"]["data.path"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_is_commented(path):
    for line in path.read_text().splitlines():
        spoken_for = ("class_path", "init_args", "    config", "    options", "    command")  # by the key above them
        if re.match(r"\s*[a-z_]+:", line) and not any(name in line for name in spoken_for):
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


# Model type and depth of what each configuration is for, from the models' own configurations.
MODELS = {
    "gpt-j-6b-counterfact": ("gptj", 28),
    "gpt-neox-20b-counterfact": ("gpt_neox", 44),
    "llama-2-7b": ("llama", 32),
    "llama-3-8b": ("llama", 32),
    "qwen2.5-7b": ("qwen2", 28),
    "qwen3-8b": ("qwen3", 36),
    "mistral-7b": ("mistral", 32),
    "gemma-2-9b": ("gemma2", 42),
    "phi-2": ("phi", 32),
    "pythia-6.9b": ("gpt_neox", 32),
    "gpt2-xl": ("gpt2", 48),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_suit_the_model(name):
    written = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    family, depth = MODELS[name]
    layers = written["model"]["layers"]
    assert family in ARCHITECTURES
    assert max(layers) < depth / 2
    if "by depth" in (ROOT / "configs" / f"{name}.yaml").read_text():
        assert layers == suggest_layers(depth)


@pytest.mark.parametrize("name", mostly_slow(MODELS, ["llama-3-8b", "gemma-2-9b"]))
def test_every_configuration_edits_a_tiny_model_of_its_family(name, tmp_path):
    family, _ = MODELS[name]
    tiny = save_tiny(family, tmp_path / "tiny")
    tiny_fit(tmp_path, tiny, "--model.layers", "[1, 2]", "--model.context_count", "1", config=f"{name}.yaml")
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["status"], state["edits_written"], state["verdict"]["facts"]) == ("finished", 2, 2)


@pytest.mark.parametrize(
    ("depth", "expected"), [(8, [0, 1, 2]), (28, [3, 4, 5, 6, 7]), (32, [4, 5, 6, 7, 8]), (1, [0])]
)
def test_advised_layers(depth, expected):
    assert suggest_layers(depth) == expected

"""Every shipped configuration parses, comments every key, and carries what it claims."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from pmet_lightning.baselines.finetuning import FineTuning
from pmet_lightning.baselines.retrieval import Retrieval
from pmet_lightning.cli.arguments import check_arguments
from pmet_lightning.compare.plan import Method
from pmet_lightning.model.architectures import ARCHITECTURES, suggest_layers
from pmet_lightning.run.lightning_cli import build_fit
from pmet_lightning.run.options import UsageError
from tests.conftest import ROOT, mostly_slow
from tests.harness import tiny_fit
from tests.tiny import save_tiny

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FITS = [path for path in CONFIGS if path.stem.split("-")[0] not in ("compare", "finetune", "retrieve")]


OWN = "your-model.yaml"  # leaves the model and the facts to be given


@pytest.mark.parametrize("path", FITS, ids=lambda path: path.stem)
def test_every_configuration_builds_its_objects(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"model.model_name": "a-folder", "data.path": "facts.json"} if path.name == OWN else {}
    cli = build_fit(str(path), given)
    written = yaml.safe_load(path.read_text())
    written["model"].setdefault("model_name", "a-folder")
    assert (cli.model.layers or "auto") == written["model"]["layers"]
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


@pytest.mark.parametrize("name", ["compare.yaml", "compare-gemma.yaml", "compare-constructions.yaml"])
def test_the_methods_of_the_comparison_build_their_objects(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = yaml.safe_load((ROOT / "configs" / name).read_text())
    ablations = {"PMET, own", "FFN, replay"} if "constr" in name else {"null space", "even spread", "retrieval"}
    assert {"PMET", "MEMIT"} | ablations <= set(written["methods"])
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


# Model type and depths of what each configuration is for, from the models' own configurations.
MODELS = {
    "gpt-j-6b-counterfact": ("gptj", {"6B": 28}),
    "gpt-neox-20b-counterfact": ("gpt_neox", {"20B": 44}),
    "llama-2-7b": ("llama", {"7B": 32}),
    "llama-3-8b": ("llama", {"8B": 32}),
    "llama-3.2": ("llama", {"1B": 16, "3B": 28}),
    "qwen2.5": ("qwen2", {"0.5B": 24, "1.5B": 28}),
    "qwen2.5-7b": ("qwen2", {"7B": 28}),
    "qwen3": ("qwen3", {"0.6B": 28, "1.7B": 28, "4B": 36, "8B": 36}),
    "mistral-7b": ("mistral", {"7B": 32}),
    "gemma-2-9b": ("gemma2", {"9B": 42}),
    "gemma-3": ("gemma3_text", {"1B": 26, "4B": 34}),
    "smollm2": ("llama", {"135M": 30, "360M": 32, "1.7B": 24}),
    "phi-2": ("phi", {"2.7B": 32}),
    "pythia-6.9b": ("gpt_neox", {"6.9B": 32}),
    "gpt2-xl": ("gpt2", {"1.5B": 48}),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_suit_the_model(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    family, depths = MODELS[name]
    layers = yaml.safe_load(text)["model"]["layers"]
    assert family in ARCHITECTURES
    for depth in depths.values():
        chosen = suggest_layers(depth) if layers == "auto" else layers
        assert max(chosen) <= depth / 2
        if "by depth" in text:
            assert chosen == suggest_layers(depth)


COMMENTED = re.compile(r"(\[[\d, ]+\]) of ((?:\d+ \([^)]*\)(?: or )?)+)")


@pytest.mark.parametrize("name", [name for name, (_, depths) in MODELS.items() if len(depths) > 1])
def test_a_configuration_of_several_sizes_says_what_holds_for_each(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    sizes = MODELS[name][1]
    heading = text.splitlines()[0]
    assert all(size in heading for size in sizes)
    assert "not run" in text
    assert f"{min(sizes, key=_parameters)}" in yaml.safe_load(text)["model"]["model_name"].upper()
    comment = next(line for line in text.splitlines() if line.startswith("  layers:")).partition("#")[2]
    said = {size: int(depth) for depth, of in re.findall(r"(\d+) \(([^)]*)\)", comment) for size in of.split(", ")}
    assert said == sizes
    for layers, of in COMMENTED.findall(comment):
        assert {json.dumps(suggest_layers(int(depth))) for depth in re.findall(r"(\d+) \(", of)} == {layers}


def _parameters(size: str) -> float:
    return float(size[:-1]) * {"M": 1, "B": 1000}[size[-1]]


@pytest.mark.parametrize("name", mostly_slow(MODELS, ["llama-3-8b", "gemma-2-9b", "qwen3"]))
def test_every_configuration_edits_a_tiny_model_of_its_family(name, tmp_path):
    family, _ = MODELS[name]
    tiny = save_tiny(family, tmp_path / "tiny")
    tiny_fit(tmp_path, tiny, "--model.layers", "[1, 2]", "--model.context_count", "1", config=f"{name}.yaml")
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["status"], state["edits_written"], state["verdict"]["facts"]) == ("finished", 2, 2)


def test_a_model_of_ones_own_has_to_be_named(tmp_path):
    with pytest.raises(UsageError, match=r"fit needs --model.model_name and --data.path, which your-model.yaml leaves"):
        check_arguments("fit", ["--config", OWN])
    with pytest.raises(UsageError, match=r"fit needs --model.model_name, which your-model.yaml leaves"):
        check_arguments("fit", ["--config", OWN, "--data.path", "facts.json"])


@pytest.mark.parametrize(
    ("depth", "expected"), [(8, [0, 1, 2]), (28, [3, 4, 5, 6, 7]), (32, [4, 5, 6, 7, 8]), (1, [0])]
)
def test_advised_layers(depth, expected):
    assert suggest_layers(depth) == expected

"""A model that is sharded over processes, or spread by a device map, is edited as a whole one is."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pmet_lightning import TargetOptimizer
from pmet_lightning.model.fsdp import prepare_strategy
from tests.harness import edit, matrices
from tests.processes import ROOT, standalone, started
from tests.sharded_runs import FAMILIES, fit
from tests.tiny import CONTEXTS, RECORDS, save_tiny

# GPT-J computes its attention in float32 whatever the model's precision.
TOLERANCE = {"gpt2": 1e-8, "gptj": 1e-5}


def tie(folder: str) -> None:
    """Give a model's vocabulary head the weight of its embeddings."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)


def uncommented(config: str) -> str:
    """The configuration with the strategy that it has as a comment in the place of its own."""
    lines = config.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  strategy: "))
    end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith("  # "))
    return "\n".join([*lines[:start], *("  " + line[4:] for line in lines[start + 1 : end]), *lines[end:], ""])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Tiny models, of which GPT-2 has tied embeddings, records and a corpus."""
    base = tmp_path_factory.mktemp("inputs")
    (base / "records.json").write_text(json.dumps(RECORDS))
    (base / "corpus.txt").write_text("\n".join(f"This is the text of number {i}, and it is short." for i in range(40)))
    for family in FAMILIES:
        save_tiny(family, base / family)
    tie(str(base / "gpt2"))
    (base / "multi-gpu.yaml").write_text(uncommented((ROOT / "configs" / "multi-gpu.yaml").read_text()))
    return base


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The runs on one process."""
    folder = tmp_path_factory.mktemp("whole")
    for family in FAMILIES:
        fit(folder / family, inputs, family, 1)
    return folder


@pytest.fixture(scope="module", params=[2, 3])
def sharded(request, inputs, tmp_path_factory):
    """The same with the model on several processes; three of them have unequal parts."""
    folder = tmp_path_factory.mktemp("sharded")
    done = started(standalone(request.param, "tests.sharded_runs", folder, inputs, request.param))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_weights(family, whole, sharded):
    one, several = (load_file(folder / family / "patch.safetensors") for folder in (whole, sharded))
    assert set(one) == set(several)
    for name, tensor in one.items():
        assert float((several[name] - tensor).norm() / tensor.norm()) < TOLERANCE[family], name


@pytest.mark.slow
def test_the_documented_strategy_is_the_one_that_ran(sharded):
    """As in multi-gpu.yaml, without a size; the callback of the run sees that no weight stays whole."""
    strategy = yaml.safe_load((sharded / "gpt2" / "config.yaml").read_text())["trainer"]["strategy"]
    assert strategy["class_path"] == "lightning.pytorch.strategies.ModelParallelStrategy"
    assert set(strategy["init_args"].values()) & {2, 3} == set()


def test_the_older_strategy_is_refused():
    with pytest.raises(ValueError, match=r"FSDPStrategy, expected ddp or, .*ModelParallelStrategy"):
        prepare_strategy(FSDPStrategy(), 2)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_fingerprint(family, whole, sharded):
    """Each process sees a part of the weights, and the hash is that of all of them."""
    one, several = (json.loads((f / family / "patch.json").read_text())["fingerprint"] for f in (whole, sharded))
    assert one == several
    assert (sharded / family / "edited.txt").read_text() not in ("", one)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_ledger_and_scores(family, whole, sharded):
    one, several = (
        [json.loads(line) for line in (folder / family / "ledger.jsonl").read_text().splitlines()]
        for folder in (whole, sharded)
    )
    assert len(one) == len(several) == len(RECORDS)
    for a, b in zip(one, several, strict=True):
        for name, value in a.items():
            expected = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, (float, dict)) else value
            assert b[name] == expected, name
    one, several = (json.loads((folder / family / "scores.json").read_text()) for folder in (whole, sharded))
    for phase in ("before", "after"):
        assert several[phase] == pytest.approx(one[phase], rel=1e-4, abs=1e-6)


def test_a_device_map(tmp_path):
    """All on one device here; that parts on several meet is not tested."""
    pytest.importorskip("accelerate")
    name = save_tiny("gpt2", tmp_path / "model")
    moments = {("ffn", layer): torch.eye(128) for layer in (1, 2)}
    written = []
    for device_map in (None, {"": "cpu"}):
        module = TargetOptimizer(
            name,
            layers=[1, 2],
            steps=4,
            contexts=CONTEXTS,
            dtype="float64",
            attn_implementation="eager",
            device_map=device_map,
        )
        folder = tmp_path / str(device_map is None)
        folder.mkdir()
        spread, _ = edit(module, RECORDS[:3], moments, folder, lam=2.0)
        assert ("lm" in dict(module.named_children())) == (device_map is None)  # Lightning moves what it knows
        written.append(matrices(spread.edited.deltas))
    for weight, delta in written[0].items():
        torch.testing.assert_close(written[1][weight], delta, rtol=1e-12, atol=0)

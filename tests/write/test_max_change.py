"""The bound on the change of preserved values in a write, weight by weight."""

from __future__ import annotations

import pytest
import torch

from pmet_lightning.model.projections import in_features
from tests.harness import edit, matrices
from tests.targets.test_construction import plain_parts
from tests.targets.test_target_optimizer import folder_of, moments_for, tiny_module  # noqa: F401
from tests.tiny import RECORDS

LAYERS, LEAST = (1, 2), 1e-3


def written(folder, tmp_path, max_change, records, lam=LEAST):
    """λ of each layer, and ΔW [O, I] by name."""
    tmp_path.mkdir()
    module = tiny_module(folder, layers=list(LAYERS), dtype="float64")
    spread, reports = edit(
        module, records, moments_for(folder, LAYERS), tmp_path, lam=lam, also={"max_change": max_change}
    )
    return [layer.lam for layer in reports[0].layers], matrices(spread.edited.deltas)


@pytest.mark.parametrize("family", ["gptj", "gpt2"])
@pytest.mark.parametrize("count", [2, 5])
def test_each_edit_has_its_share(family, count, folder_of, tmp_path):  # noqa: F811
    folder, c = folder_of(family), 0.01
    lams, deltas = written(folder, tmp_path / "bounded", c, RECORDS[:count])
    _, _, sites = plain_parts(folder)
    moments = moments_for(folder, LAYERS)
    for lam, layer in zip(lams, LAYERS, strict=True):
        moment = moments["ffn", layer].double()
        delta, weight = deltas[sites.weight_name("ffn", layer)].double(), sites.module("ffn", layer).weight.double()
        weight = weight if weight.shape == delta.shape else weight.T
        change = float((delta @ moment * delta).sum() / (weight @ moment * weight).sum())
        bound = c * count / (count + in_features(sites.module("ffn", layer)))
        assert lam > LEAST
        assert 0.98 * bound <= change <= bound * (1 + 1e-6)


def test_a_bound_that_holds_already_changes_nothing(folder_of, tmp_path):  # noqa: F811
    folder = folder_of("gptj")
    lams, deltas = written(folder, tmp_path / "bounded", 1e6, RECORDS, lam=2.0)
    _, expected = written(folder, tmp_path / "free", None, RECORDS, lam=2.0)
    assert lams == [2.0, 2.0]
    for name, delta in expected.items():
        assert torch.equal(deltas[name], delta)

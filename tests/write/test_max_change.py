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


def written(folder, tmp_path, max_change, records, lam=LEAST, **data):
    """λ of each layer in the last edit batch, and ΔW [O, I] by name."""
    tmp_path.mkdir()
    module = tiny_module(folder, layers=list(LAYERS), dtype="float64")
    spread, reports = edit(
        module, records, moments_for(folder, LAYERS), tmp_path, lam=lam, also={"max_change": max_change}, **data
    )
    return [layer.lam for layer in reports[-1].layers], matrices(spread.edited.deltas)


def change(delta, weight, moment):
    """tr(ΔW C ΔWᵀ) / tr(W C Wᵀ), for a weight stored either way round."""
    weight = weight if weight.shape == delta.shape else weight.T
    return float((delta @ moment * delta).sum() / (weight @ moment * weight).sum())


def share(facts, width):
    return facts / (facts + width)


@pytest.mark.parametrize("family", ["gptj", "gpt2"])
@pytest.mark.parametrize("count", [2, 5])
def test_the_bound_grows_with_the_edits(family, count, folder_of, tmp_path):  # noqa: F811
    folder, c = folder_of(family), 0.01
    lams, deltas = written(folder, tmp_path / "bounded", c, RECORDS[:count])
    _, _, sites = plain_parts(folder)
    moments = moments_for(folder, LAYERS)
    for lam, layer in zip(lams, LAYERS, strict=True):
        module, delta = sites.module("ffn", layer), deltas[sites.weight_name("ffn", layer)].double()
        bound = c * share(count, in_features(module))
        found = change(delta, module.weight.double(), moments["ffn", layer].double())
        assert lam > LEAST
        assert 0.98 * bound <= found <= bound * (1 + 1e-6)


def test_edit_batches_share_it(folder_of, tmp_path):  # noqa: F811
    """A second edit batch has what is left of the bound of one edit batch of all facts."""
    folder, c = folder_of("gptj"), 0.01
    _, first = written(folder, tmp_path / "first", c, RECORDS[:2])
    lams, total = written(folder, tmp_path / "both", c, RECORDS[:4], edit_batch=2)
    _, _, sites = plain_parts(folder)
    moments = moments_for(folder, LAYERS)
    for lam, layer in zip(lams, LAYERS, strict=True):
        module, name = sites.module("ffn", layer), sites.weight_name("ffn", layer)
        width = in_features(module)
        bound = c * (share(4, width) - share(2, width))
        found = change(
            (total[name] - first[name]).double(),
            (module.weight + first[name]).double(),
            moments["ffn", layer].double(),
        )
        assert lam > LEAST
        assert 0.98 * bound <= found <= bound * (1 + 1e-6)


def test_a_bound_that_holds_already_changes_nothing(folder_of, tmp_path):  # noqa: F811
    folder = folder_of("gptj")
    lams, deltas = written(folder, tmp_path / "bounded", 1e6, RECORDS, lam=2.0)
    _, expected = written(folder, tmp_path / "free", None, RECORDS, lam=2.0)
    assert lams == [2.0, 2.0]
    for name, delta in expected.items():
        assert torch.equal(deltas[name], delta)

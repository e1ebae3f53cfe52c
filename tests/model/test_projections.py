"""Half-precision models: everything that is optimized or solved stays in float32 or better, and roundings are told."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pmet_lightning.cli.dispatch import main
from pmet_lightning.model.architectures import architecture_of
from pmet_lightning.model.loading import load_config, load_model
from pmet_lightning.model.projections import Sites, add_to_weight, keep_in_float32
from tests.harness import edit, matrices, tiny_fit
from tests.targets.test_target_optimizer import moments_for, tiny_module
from tests.tiny import RECORDS, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_of_an_update(dtype):
    projection = nn.Linear(64, 32, bias=False, dtype=dtype)
    before = projection.weight.detach().float().clone()
    delta = 1e-3 * torch.randn(32, 64) * before.abs()
    written = add_to_weight(projection, delta)
    stored = projection.weight.detach().float() - before
    assert written.rounding == pytest.approx(float((stored - delta).norm() / delta.norm()), rel=1e-5)
    assert written.changed == pytest.approx(float((stored != 0).float().mean()), rel=1e-5)
    assert written.kept == pytest.approx(float((stored * delta).sum() / delta.square().sum()), rel=1e-5)
    if dtype == torch.float32:
        assert written.kept == pytest.approx(1, abs=1e-3)
        assert written.changed > 0.99
    else:  # an eighth of a percent of a weight is less than half of bfloat16's last bit
        assert written.changed < 0.2
        assert written.rounding > 0.5


def test_nothing_to_add_is_wholly_stored():
    assert add_to_weight(nn.Linear(4, 4), torch.zeros(4, 4)).changed == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_are_edited_in_float32(folder, tmp_path, dtype, caplog):
    module = tiny_module(folder, dtype=dtype)
    spread, reports = edit(module, RECORDS[:3], moments_for(folder), tmp_path, lam=2.0)
    assert module.model.dtype == getattr(torch, dtype)
    assert {delta.dtype for delta in module.deltas.parameters()} == {torch.float32}
    assert {delta.dtype for delta in spread.edited.deltas.values()} == {torch.float32}
    assert {v.dtype for t in reports[0].targets for v in t.values.values()} == {torch.float32}
    assert all(0.5 < layer.kept < 1.5 for layer in reports[0].layers)
    assert all(layer.rounding > 1e-3 for layer in reports[0].layers)


def test_little_that_is_stored_gets_a_warning(folder, tmp_path, caplog):
    edit(tiny_module(folder, dtype="bfloat16"), RECORDS[:1], moments_for(folder), tmp_path, lam=1e3)
    assert "keep_float32" in caplog.text


def test_edited_matrices_can_stay_in_float32(folder, tmp_path, caplog):
    module = tiny_module(folder, dtype="bfloat16", keep_float32=True)
    spread, reports = edit(module, RECORDS[:1], moments_for(folder), tmp_path, lam=1e3)
    assert "keep_float32" not in caplog.text
    assert all(layer.rounding < 1e-2 for layer in reports[0].layers)
    kinds = {name: p.dtype for name, p in module.model.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {
        module.sites.weight_name(site, layer) for site in ("attn", "ffn") for layer in (1, 2)
    }
    assert set(spread.edited.deltas) <= set(kinds)


def test_a_float32_projection_in_a_half_precision_model_computes_what_it_did(folder):
    """On either side of the projection nothing notices."""
    model = load_model(folder, "bfloat16")
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        before = model(ids).logits
        keep_in_float32(Sites.of(model, architecture_of(load_config(folder))).module("ffn", 1))
        after = model(ids).logits
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)


def test_export_can_keep_every_bit(folder, tmp_path):
    """A bfloat16 model, edited: exported in its own precision the edit is rounded, in float32 it is whole."""
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(base)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(base)
    tiny_fit(tmp_path, str(base), "--model.dtype", "auto", "--model.layers", "auto")
    main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "half")])
    main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "whole"), "--dtype", "float32"])
    from pmet_lightning.model.patch import load_patch

    patched, manifest = load_patch(tmp_path / "run" / "patch.safetensors")
    deltas = matrices(patched)
    assert manifest["dtype"] == "bfloat16"
    assert manifest["layers"] == [0, 1]
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").state_dict()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto").state_dict()
    for name, value in model.state_dict().items():
        assert half[name].dtype == torch.bfloat16
        assert whole[name].dtype == torch.float32
        assert torch.equal(whole[name], value.float() + deltas.get(name, 0))
        assert torch.equal(half[name], (value.float() + deltas.get(name, 0)).to(torch.bfloat16))

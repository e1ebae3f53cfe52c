"""The sums of a tensor's bits that a fingerprint is made of."""

from __future__ import annotations

import pytest
import torch

from pmet_lightning.model import fingerprint as module
from pmet_lightning.model.architectures import architecture_of
from pmet_lightning.model.fingerprint import checksum, fingerprint
from pmet_lightning.model.loading import load_model
from pmet_lightning.model.projections import Sites, add_to_weight, keep_in_float32
from tests.tiny import save_tiny

BITS = {torch.uint8: torch.uint8, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("shape", [(0,), (1,), (5, 3), (6, 7)])
def test_the_sums_are_those_of_one_element_after_the_other(shape, dtype, monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 7)
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    kept = tensor.clone()
    plain = weighted = 0
    for position, element in enumerate(tensor.flatten().view(BITS[dtype]).tolist()):
        plain += element
        weighted += element * (2 * position + 1)
    assert checksum(tensor) == f"{plain % 2**64:x}:{weighted % 2**64:x}"
    assert torch.equal(tensor, kept)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@torch.no_grad()
def test_it_does_not_depend_on_which_projections_are_held_in_float32(dtype, tmp_path):
    model = load_model(save_tiny("gpt2", tmp_path), dtype)
    sites, before = Sites.of(model, architecture_of(model.config)), fingerprint(model)
    for layer in (1, 2):
        keep_in_float32(sites.module("ffn", layer))
        assert fingerprint(model) == before
    weight = sites.module("ffn", 2).weight
    kept = weight.clone()
    add_to_weight(sites.module("ffn", 2), torch.full((weight.shape[1], weight.shape[0]), 1e-6))
    assert fingerprint(model) != before, "what half precision would round away is an edit"
    weight.copy_(kept)
    assert fingerprint(model) == before

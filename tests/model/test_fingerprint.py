"""The sums of a tensor's bits that a fingerprint is made of."""

from __future__ import annotations

import pytest
import torch

from pmet_lightning.model import fingerprint
from pmet_lightning.model.fingerprint import checksum

BITS = {torch.uint8: torch.uint8, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("shape", [(0,), (1,), (5, 3), (6, 7)])
def test_the_sums_are_those_of_one_element_after_the_other(shape, dtype, monkeypatch):
    monkeypatch.setattr(fingerprint, "_CHUNK_CPU", 7)
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    kept = tensor.clone()
    plain = weighted = 0
    for position, element in enumerate(tensor.flatten().view(BITS[dtype]).tolist()):
        plain += element
        weighted += element * (2 * position + 1)
    assert checksum(tensor) == f"{plain % 2**64:x}:{weighted % 2**64:x}"
    assert torch.equal(tensor, kept)

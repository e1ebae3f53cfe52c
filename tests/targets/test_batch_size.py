"""Free memory, its end, and how many edits go together. A GPU is played, since its numbers come from torch."""

from __future__ import annotations

import logging

import pytest
import torch

from pmet_lightning.data.token_rows import TokenRow
from pmet_lightning.targets.batch_size import ModelSize
from pmet_lightning.targets.loop import Request, choose_micro_batch
from pmet_lightning.utils.memory import free_memory, is_out_of_memory


def test_what_torch_keeps_on_a_gpu_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert free_memory(torch.device("cuda", 0)) == 1400


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("whatever it says"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
    ],
)
def test_a_failed_allocation_is_known_by_what_it_says(error, expected):
    assert is_out_of_memory(error) is expected


def test_how_many_are_together_is_said_only_where_it_is_not_all_of_them(caplog):
    # A row of 512 tokens after the subject: eight of them are as many as a CPU gains from.
    row = TokenRow(list(range(600)), subject=88, labels=(1,))
    size = ModelSize(8, 1, 1, vocabulary=10, itemsize=4, whole_rows=False, whole_logits=False)
    requests = [Request([row], "a fact", i) for i in range(12)]
    with caplog.at_level(logging.INFO, "pmet_lightning"):
        assert choose_micro_batch("auto", requests[:8], size, torch.device("cpu")) == 8
        assert caplog.messages == []
        assert choose_micro_batch("auto", requests, size, torch.device("cpu")) == 6, "two equal rounds"
        assert caplog.messages == ["12 edits, of which up to 8 are optimized together"]

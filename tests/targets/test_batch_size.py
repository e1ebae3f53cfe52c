"""Free memory and its end: a GPU is played, since its numbers come from torch."""

from __future__ import annotations

import pytest
import torch

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

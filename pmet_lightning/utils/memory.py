"""How much memory a device has, and whether an error says that it was not enough."""

from __future__ import annotations

import psutil
import torch

# What a failed allocation says where it is no OutOfMemoryError: on a CPU, in the CUDA driver, in cuBLAS.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, those that torch keeps there for its next tensors among them."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in _OUT_OF_MEMORY)

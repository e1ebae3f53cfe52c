"""How much memory a device has free, and whether an error means that it ran out."""

from __future__ import annotations

import psutil
import torch

# Messages of failed allocations that are not an OutOfMemoryError: on a CPU, in the CUDA driver, in cuBLAS.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, including those that torch's allocator has cached."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is a failed allocation, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in _OUT_OF_MEMORY)

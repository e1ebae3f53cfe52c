"""A hash of a model's weights: equal on every device, different after any edit."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from pmet_lightning.model.fsdp import first_local_row, local_rows, sum_over_shards
from pmet_lightning.model.projections import held_precisions
from pmet_lightning.model.quantized_base import dense_state

# Elements hashed at a time: few enough for a CPU's cache, and many for a GPU, where each call has its price.
CPU_CHUNK, CHUNK = 1 << 16, 1 << 22


def fingerprint(model: nn.Module) -> str:
    """Hash of every weight's name, shape, dtype and bits: equal on every device, different after any edit.

    Integer sums of the bits, weighted by position, are exact in any order, so they can be computed on
    the model's own device at memory speed; the sums are then hashed. A quantised weight counts as the one that its bits
    stand for, and one that is held in float32 and not edited as it was loaded, so that the hash does not depend on
    which projections are held.
    """
    digest, held = hashlib.sha256(), held_precisions(model)
    for name, state in dense_state(model):
        tensor = _as_loaded(state, held.get(name.rpartition(".")[0]))
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{checksum(tensor)}".encode())
    return digest.hexdigest()[:16]


def _as_loaded(tensor: Tensor, loaded: torch.dtype | None) -> Tensor:
    """A tensor in the precision that it was loaded in, if that loses nothing."""
    if loaded is None:
        return tensor
    rounded = tensor.to(loaded)
    lost = (local_rows(rounded).to(tensor.dtype) != local_rows(tensor)).sum()
    return tensor if int(sum_over_shards(tensor, lost)) else rounded


def checksum(tensor: Tensor) -> str:
    """Exact sums of a tensor's bits, plain and weighted by position."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = local_rows(tensor).contiguous().flatten().view(views[tensor.element_size()])
    offset = first_local_row(tensor) * math.prod(tensor.shape[1:])
    size = CPU_CHUNK if bits.device.type == "cpu" else CHUNK
    weight = 2 * torch.arange(min(size, bits.numel()), device=bits.device) + 1
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)  # modulo 2^64
    for start in range(0, bits.numel(), size):
        chunk = bits[start : start + size].to(torch.int64)
        total = chunk.sum()
        sums += torch.stack([total, (chunk * weight[: len(chunk)]).sum() + 2 * (offset + start) * total])
    plain, weighted = sum_over_shards(tensor, sums).tolist()
    return f"{plain % (1 << 64):x}:{weighted % (1 << 64):x}"

"""Results on their way from a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_cpu(rows: Tensor) -> list[Tensor]:
    """Return a copy of each row in memory of its own, shape ``(P,)`` each, on the CPU.

    From a GPU it goes into page-locked memory, where the device writes without a detour and which
    torch keeps for the next results.

    Args:
        rows: shape ``(K, P)``.
    """
    from_gpu = rows.device.type == "cuda"
    copies = [torch.empty(row.shape, dtype=rows.dtype, pin_memory=from_gpu) for row in rows]
    for copy, row in zip(copies, rows, strict=True):
        copy.copy_(row, non_blocking=True)
    if from_gpu:
        torch.cuda.synchronize(rows.device)
    return copies

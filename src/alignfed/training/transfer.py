"""Results on their way from a device."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def to_cpu(rows: Tensor) -> list[Tensor]:
    """Return a copy of each row in memory of its own, shape ``(P,)`` each, on the CPU.

    From a GPU it goes into page-locked memory, where the device writes without a detour. Torch
    takes such memory in powers of two and keeps it for the next results; where the system gives no
    more of it, ordinary memory does.

    Args:
        rows: shape ``(K, P)``.
    """
    from_gpu = rows.device.type == "cuda"
    copies = [_empty(row, locked=from_gpu) for row in rows]
    for copy, row in zip(copies, rows, strict=True):
        copy.copy_(row, non_blocking=from_gpu)
    if from_gpu:
        torch.cuda.synchronize(rows.device)
    return copies


def _empty(like: Tensor, *, locked: bool) -> Tensor:
    if locked:
        with contextlib.suppress(RuntimeError):
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
    return torch.empty(like.shape, dtype=like.dtype)

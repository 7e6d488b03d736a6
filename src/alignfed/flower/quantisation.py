"""Blockwise int8: each block of a flattened tensor is scaled by its own largest magnitude.

Scheme of Dettmers et al. 2022 (arXiv 2110.02861, section 2.1) with linear codes: an element is off
by at most half a step, ``max |block| / 254``.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share a scale: 4 bytes more for 256, 1.6 %."""

_LEVELS = 127


def num_blocks(count: int) -> int:
    """Return how many scales ``count`` elements have."""
    return -(-count // BLOCK)


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes in the shape of ``values`` and fp32 scales, shape ``(blocks,)``.

    A block with NaN or infinite elements gets a scale that is not finite, so that it cannot pass
    for numbers afterwards.
    """
    blocks = _blocks(values.to(torch.float32))
    scales = blocks.abs().amax(dim=1) / _LEVELS
    # Where all elements are zero, or too small for a scale, the codes are zero.
    divisors = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = torch.nan_to_num(blocks / divisors.unsqueeze(1)).round_().clamp_(-_LEVELS, _LEVELS)
    return codes.to(torch.int8).reshape(-1)[: values.numel()].reshape(values.shape), scales


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """Return fp32 values in the shape of ``codes``."""
    values = _blocks(codes.to(torch.float32)) * scales.unsqueeze(1)
    return values.reshape(-1)[: codes.numel()].reshape(codes.shape)


def _blocks(values: Tensor) -> Tensor:
    flat = values.reshape(-1)
    missing = num_blocks(flat.numel()) * BLOCK - flat.numel()
    return torch.nn.functional.pad(flat, (0, missing)).reshape(-1, BLOCK)

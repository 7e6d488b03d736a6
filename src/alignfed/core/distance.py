"""How far an adapter has moved from its base: of one upload, or of many small ones at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

import torch

from alignfed.core.adapter import PIECE, Adapter, pieces, require_same_layout

_LAYOUT, _DTYPE = attrgetter("layout"), attrgetter("dtype")

SMALL = 4096
"""Elements up to which calling torch takes longer than the arithmetic it is called for."""


def distance(adapter: Adapter, base: Adapter) -> float:
    """Return the Euclidean norm of ``adapter - base``, without keeping the difference.

    Large buffers are taken piece by piece, so that a piece's difference is squared while it is in
    cache and both adapters are read from memory once. The result is not finite if any element of
    either is not.

    Raises:
        AdapterError: the layouts differ.
    """
    if adapter.layout is not base.layout:
        require_same_layout(adapter, base)
    square = 0.0
    for dtype, buffer in adapter.buffers.items():
        other, count = base.buffers[dtype], buffer.numel()
        if dtype is torch.float32 and count <= SMALL:
            square += torch.dist(buffer, other).item() ** 2
        elif dtype is torch.float32 and count <= PIECE:
            gap = buffer - other
            square += gap.dot(gap).item()
        else:
            scratch = torch.empty(min(PIECE, count), dtype=torch.float32, device=buffer.device)
            for new, old in zip(pieces(buffer), pieces(other), strict=True):
                gap = scratch[: new.numel()]
                if dtype is torch.float32:
                    torch.sub(new, old, out=gap)
                else:  # subtracted in fp32: a difference of two halves may need more digits
                    gap.copy_(new).sub_(old)
                square += gap.dot(gap).item()
    return math.sqrt(square)


def small_distances(adapters: Sequence[Adapter], bases: Sequence[Adapter]) -> list[float] | None:
    """Return the ``distance`` of each small adapter from its base, to the bit, all at once.

    Returns:
        None where there is nothing to win or one of them is odd: not all of one layout, not small,
        not fp32 alone, or an adapter whose buffers are not what its layout says. Whoever is given
        distances need not compare layouts, shapes and dtypes again.
    """
    layout, fp32 = bases[0].layout, torch.float32
    count = layout.sizes.get(fp32, 0)
    if len(layout.sizes) > 1 or not 0 < count <= SMALL:
        return None
    every = (*adapters, *bases)
    if list(map(_LAYOUT, every)).count(layout) < len(every):
        return None
    try:
        buffers = [adapter.buffers[fp32] for adapter in every]
        rows = torch.stack(buffers)
    except (KeyError, RuntimeError):  # none, or of different shapes
        return None
    if list(map(_DTYPE, buffers)).count(fp32) < len(every):  # stacked as if they were one
        return None
    if rows.shape != (2 * len(adapters), count):
        return None
    new, old = rows.chunk(2)
    found: list[float] = torch.linalg.vector_norm(new - old, dim=1).tolist()
    return found


__all__ = ["SMALL", "distance", "small_distances"]

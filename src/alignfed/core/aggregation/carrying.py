"""Inner products of updates carried to the current version, without forming one of them whole.

A block of every update at a time: its difference from its base is taken and mapped in a core's own
cache, then multiplied with the same block of all the others. Each upload is read from memory once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, AdapterLayout
from alignfed.core.alignment import RankMap

BLOCK = 1 << 15
"""Elements of every update that are compared at a time."""

SCRATCH = 1 << 17
"""Elements that are mapped at a time."""

SLAB = 1 << 12
"""Elements of every row that are multiplied at a time."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbours in a list of updates that share a base, and so a map.

    Attributes:
        start: position of the first.
        stop: position after the last.
        base: what they started from.
        maps: rank-space maps by module; empty where nothing is carried.
    """

    start: int
    stop: int
    base: Adapter
    maps: Mapping[str, RankMap] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Region:
    """One matrix of every adapter: a factor, a dense tensor or, if nothing is mapped, a buffer.

    Attributes:
        name: its module.
        part: ``a``, ``b`` or ``dense``.
        dtype: whose flat buffer it lies in.
        shape: two sizes; A is cut into blocks of columns, anything else into blocks of rows.
        offset: where it begins.
    """

    name: str
    part: str
    dtype: torch.dtype
    shape: tuple[int, int]
    offset: int

    @property
    def cut(self) -> int:
        """The dimension that is cut into blocks; a map works on the other one."""
        return 1 if self.part == "a" else 0

    @property
    def step(self) -> int:
        """How many columns (or rows) make a block."""
        return min(self.shape[self.cut], max(1, BLOCK // max(1, self.shape[1 - self.cut])))

    @property
    def largest_block(self) -> int:
        """Elements of a block."""
        return self.step * self.shape[1 - self.cut]

    def of(self, adapter: Adapter) -> Tensor:
        """Return the matrix in an adapter."""
        size = self.shape[0] * self.shape[1]
        return adapter.buffers[self.dtype][self.offset : self.offset + size].view(self.shape)


def carried_products(
    updates: Sequence[Adapter], runs: Sequence[Run], first: int, layout: AdapterLayout
) -> Tensor:
    """Return inner products of the carried updates from position ``first`` on with all of them.

    Exact to fp32 within a block, summed over blocks in fp64. Where no run has maps, LoRA factors
    and dense tensors are not told apart: all of it is in the first part of the result.

    Args:
        updates: adapters of one layout.
        runs: the positions of all updates, in order.
        first: position of the first whose products are wanted.
        layout: the common layout.

    Returns:
        Shape ``(2, K - first, K)``, fp64: over LoRA factors, and over dense tensors.
    """
    found = torch.zeros(2, len(updates) - first, len(updates), dtype=torch.float64)
    told_apart = any(run.maps for run in runs)
    regions = list(_regions(layout, told_apart))
    largest = max((region.largest_block for region in regions), default=0)
    device = next(iter(updates[0].buffers.values())).device
    # fp32 whatever the adapters hold: a difference of two halves may need more digits than one.
    room = torch.empty(len(updates) * largest, dtype=torch.float32, device=device)
    scratch = torch.empty(max(SCRATCH, largest), dtype=torch.float32, device=device)
    for region in regions:
        products = _region_products(region, updates, runs, first, room, scratch)
        found[int(told_apart and region.part == "dense")] += products
    return found


def _regions(layout: AdapterLayout, told_apart: bool) -> Iterator[_Region]:
    if not told_apart:
        for dtype, count in layout.sizes.items():
            yield _Region("", "dense", dtype, (count, 1), 0)
        return
    for name, part, dtype, shape, offset in layout.slices:
        if part == "dense":
            yield _Region(name, part, dtype, (math.prod(shape), 1), offset)
        else:
            yield _Region(name, part, dtype, (shape[0], shape[1]), offset)


def _region_products(
    region: _Region,
    updates: Sequence[Adapter],
    runs: Sequence[Run],
    first: int,
    room: Tensor,
    scratch: Tensor,
) -> Tensor:
    """Return the products over one region; ``room`` takes a block of all, ``scratch`` of a few."""
    count, cut, step = len(updates), region.cut, region.step
    new = [region.of(update) for update in updates]
    old = [region.of(run.base) for run in runs]
    length, depth = region.shape[cut], region.shape[1 - cut]
    members = max(1, SCRATCH // max(1, region.largest_block))
    found = torch.zeros(count - first, count, dtype=torch.float64)
    for begin in range(0, length, step):
        width = min(step, length - begin)
        rows = _stacked(room, count, width, depth, cut)
        blocks = [matrix.narrow(cut, begin, width) for matrix in new]
        for run, base in zip(runs, old, strict=True):
            before = base.narrow(cut, begin, width)
            turn = run.maps.get(region.name) if region.part != "dense" else None
            if turn is None:
                target = rows.narrow(cut, run.start, run.stop - run.start)
                _subtract(blocks[run.start : run.stop], before, target, cut)
                continue
            for start in range(run.start, run.stop, members):
                some = min(members, run.stop - start)
                deltas = _stacked(scratch, some, width, depth, cut)
                _subtract(blocks[start : start + some], before, deltas, cut)
                target = rows.narrow(cut, start, some)
                if cut:
                    torch.mm(turn.left, deltas.flatten(1), out=target.flatten(1))
                else:
                    torch.mm(deltas.flatten(0, 1), turn.right, out=target.flatten(0, 1))
        slabs = rows if cut else _slabs(rows.flatten(1))
        found += torch.bmm(slabs[:, first:], slabs.transpose(1, 2)).double().sum(0).cpu()
    return found


def _slabs(vectors: Tensor) -> Tensor:
    """Return vectors cut into ``(pieces, count, SLAB)``: short rows are multiplied faster."""
    count, length = vectors.shape
    slab = SLAB if length % SLAB == 0 else length
    return vectors.view(count, -1, slab).transpose(0, 1)


def _stacked(room: Tensor, count: int, width: int, depth: int, cut: int) -> Tensor:
    """Return ``(depth, count, width)`` for blocks of columns, ``(count, width, depth)`` of rows."""
    shape = (depth, count, width) if cut else (count, width, depth)
    return room[: count * width * depth].view(shape)


def _subtract(blocks: Sequence[Tensor], base: Tensor, out: Tensor, cut: int) -> None:
    for block, row in zip(blocks, out.unbind(cut), strict=True):
        if block.dtype is torch.float32:
            torch.sub(block, base, out=row)
        else:
            row.copy_(block).sub_(base)

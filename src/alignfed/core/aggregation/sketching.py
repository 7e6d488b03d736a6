"""Sketches: an adapter in so many numbers, such that inner products survive.

A CountSketch (Charikar, Chen and Farach-Colton 2002; as feature hashing, Weinberger et al. 2009,
arXiv 0902.2206): every element is added to one bucket, with a random sign. Where elements of two
vectors meet in a bucket their signs agree or differ by chance, so that the inner product of two
sketches is, on average over signs and places, that of the vectors. It happens twice here:

1. A LoRA factor is halved along its long side, again and again: one half plus the other with random
   signs, one for a column of A or a row of B. A rank-space map works on the other side, so that it
   may be applied afterwards, to what is left.
2. What is left, and dense tensors as they are, is added to the buckets. A stretch of neighbours
   keeps its order: where it begins is drawn, and its signs are a stretch of one vector of signs.

Both are passes in cache. Errors have a standard deviation, as a share of the product of the two
vectors' lengths, of at most ``sqrt(2 / buckets)`` from the second and ``sqrt(2 / NARROWEST)`` from
the first; that only if all of an update were one factor of rank one. Of M factors that move equally
it is ``sqrt(M)`` times smaller, and smaller again if they have more than one direction.

Nothing is drawn anew: a layout has the same places and signs in every process, on every machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, AdapterLayout
from alignfed.core.alignment import RankMap

NARROWEST = 1 << 10
"""A factor's long side is halved while it stays at least as long as this."""

SPREAD = 1 << 12
"""Places where the signs of a halving may begin in their vector."""

SLAB = 1 << 12
"""Buckets whose products are summed in fp32 before fp64 takes over."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Elements that go to neighbouring buckets.

    Attributes:
        start: the first, counted from the beginning of what is left of its group.
        stop: after the last.
        bucket: that of the first; the others follow it, past the last bucket too.
        signs: +1 and -1.
    """

    start: int
    stop: int
    bucket: int
    signs: Tensor


@dataclass(frozen=True, slots=True)
class _Place:
    """One tensor of every adapter, and how it is halved.

    Attributes:
        name: its module.
        part: ``a``, ``b`` or ``dense``.
        dtype: whose flat buffer it lies in.
        shape: its shape.
        halvings: signs of the second half, one tensor each: of columns for A, of elements for B.
    """

    name: str
    part: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    halvings: tuple[Tensor, ...]

    @property
    def left(self) -> int:
        """Elements that are left of it."""
        return math.prod(self.shape) >> len(self.halvings)


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring tensors whose halves go to the buckets together.

    Attributes:
        places: of the tensors: LoRA factors or dense tensors, not both.
        stretches: of what is left of all of them, end to end.
    """

    places: tuple[_Place, ...]
    stretches: tuple[_Stretch, ...]


@dataclass(frozen=True, slots=True)
class Sketching:
    """Where each element of a layout goes, and with which sign.

    Attributes:
        layout: of the adapters.
        buckets: numbers in a sketch.
        groups: all tensors, in the layout's order.
    """

    layout: AdapterLayout
    buckets: int
    groups: tuple[_Group, ...]

    def sketch(
        self, adapter: Adapter, maps: Mapping[str, RankMap], base: Adapter | None = None
    ) -> Tensor:
        """Return the sketch of an adapter, or of its difference from ``base``, carried by maps.

        Linear: an update's sketch is also its adapter's less its base's, as far as fp32 goes.

        Args:
            adapter: of this layout.
            maps: rank-space maps by module; empty carries nothing.
            base: what to subtract first.

        Returns:
            Shape ``(1, buckets)``, or ``(2, buckets)`` where there are dense tensors; fp32: of LoRA
            factors, and of dense tensors.
        """
        kinds = 1 + bool(self.layout.dense)
        # Stretches run past the last bucket; what lies beyond is added to the first ones at last.
        sums = torch.zeros(kinds, 2 * self.buckets, dtype=torch.float32)
        tensors, bases = self._tensors(adapter), None if base is None else self._tensors(base)
        for group in self.groups:
            left = []
            for place in group.places:
                values = next(tensors)
                if bases is not None:
                    values = values - next(bases)
                left.append(_folded(values, place, maps))
            together = torch.cat(left) if len(left) > 1 else left[0]
            target = sums[int(group.places[0].part == "dense")]
            for part in group.stretches:
                some = target[part.bucket : part.bucket + part.stop - part.start]
                some.addcmul_(together[part.start : part.stop], part.signs)
        return sums[:, : self.buckets] + sums[:, self.buckets :]

    def _tensors(self, adapter: Adapter) -> Iterator[Tensor]:
        """Yield an adapter's tensors in order, flat, fp32."""
        slices = self.layout.slices
        parts = {
            dtype: iter(
                torch.split(buffer, [math.prod(shape) for *_, d, shape, _ in slices if d is dtype])
            )
            for dtype, buffer in adapter.buffers.items()
        }
        for _, _, dtype, _, _ in slices:
            part = next(parts[dtype])
            yield part if dtype is torch.float32 else part.float()


@lru_cache(maxsize=4)
def sketching(
    layout: AdapterLayout, buckets: int, seed: int = 0, narrowest: int = NARROWEST
) -> Sketching:
    """Return how adapters of a layout are sketched.

    Args:
        layout: the layout.
        buckets: numbers in a sketch, at least 1.
        seed: names the draw; sketches of different draws have nothing to do with each other.
        narrowest: what no long side is halved below.
    """
    drawn = _numbers(seed)
    halvings = _Halvings(layout, narrowest, seed)
    places = [
        _Place(name, part, dtype, shape, tuple(halvings.of(part, shape, drawn)))
        for name, part, dtype, shape, _ in layout.slices
    ]
    groups = [(some, sum(place.left for place in some)) for some in _neighbours(places, buckets)]
    count = sum(math.ceil(length / buckets) for _, length in groups)
    # Two stretches must not agree in the signs of all buckets: an element's sign is found at its
    # bucket's number plus an offset that only its stretch has, drawn from an interval of its own.
    width = max(1, buckets // max(1, count))
    signs = _signs(count * width + 2 * buckets, f"buckets {seed}")
    found, offset = [], 0
    for some, length in groups:
        stretches = []
        for start in range(0, length, buckets):
            stop, bucket = min(start + buckets, length), next(drawn) % buckets
            first = offset + next(drawn) % width + bucket
            offset += width
            stretches.append(_Stretch(start, stop, bucket, signs[first : first + stop - start]))
        found.append(_Group(tuple(some), tuple(stretches)))
    return Sketching(layout, buckets, tuple(found))


def sketched_products(sketches: Sequence[Tensor]) -> Tensor:
    """Return the inner products of sketches, shape ``(2, K, K)``, fp64: of factors, and of dense.

    Args:
        sketches: K of one ``Sketching``.
    """
    kinds, buckets = sketches[0].shape
    found = torch.zeros(2, len(sketches), len(sketches), dtype=torch.float64)
    for start in range(0, buckets, SLAB):
        rows = torch.stack([one[:, start : start + SLAB] for one in sketches], dim=1)
        found[:kinds] += torch.bmm(rows, rows.transpose(1, 2)).double()
    return found


def _neighbours(places: Sequence[_Place], limit: int) -> Iterator[list[_Place]]:
    """Yield places of one kind that follow each other, as many as fit ``limit``, at least one."""
    some: list[_Place] = []
    for place in places:
        alike = not some or (some[0].part == "dense") == (place.part == "dense")
        if not alike or (some and sum(one.left for one in some) + place.left > limit):
            yield some
            some = []
        some.append(place)
    if some:
        yield some


def _folded(values: Tensor, place: _Place, maps: Mapping[str, RankMap]) -> Tensor:
    """Return a factor, flat, halved along its long side and then carried by its module's map."""
    if place.part == "dense":
        return values
    if place.part == "a":
        factor = values.view(place.shape)
        for signs in place.halvings:
            kept, added = factor.chunk(2, 1)
            factor = torch.addcmul(kept, added, signs)
        return (maps[place.name].left @ factor if maps else factor).flatten()
    for signs in place.halvings:  # halves of rows are halves of the flat tensor
        kept, added = values.chunk(2)
        values = torch.addcmul(kept, added, signs)
    return (values.view(-1, place.shape[1]) @ maps[place.name].right).flatten() if maps else values


class _Halvings:
    """Signs for halvings, in vectors that all tensors share; each begins at a place of its own."""

    def __init__(self, layout: AdapterLayout, narrowest: int, seed: int) -> None:
        self._narrowest = narrowest
        factors = [(part, shape) for _, part, _, shape, _ in layout.slices if part != "dense"]
        longest = max((max(shape) for _, shape in factors), default=0)
        levels = max((self.count(part, shape) for part, shape in factors), default=0)
        # A level has its own signs: halvings of one factor must not repeat each other.
        self._columns = [
            _signs(longest // 2 + SPREAD, f"halving {level} {seed}") for level in range(levels)
        ]
        self._rows = {
            rank: [signs.repeat_interleave(rank) for signs in self._columns]
            for rank in {shape[1] for part, shape in factors if part == "b"}
        }

    def count(self, part: str, shape: tuple[int, ...]) -> int:
        """Return how often a tensor is halved: LoRA factors alone, along their long side."""
        if part == "dense":
            return 0
        side, count = shape[1] if part == "a" else shape[0], 0
        while side % 2 == 0 and side >= 2 * self._narrowest:
            side, count = side // 2, count + 1
        return count

    def of(self, part: str, shape: tuple[int, ...], drawn: Iterator[int]) -> Iterator[Tensor]:
        """Yield the signs of a tensor's halvings."""
        for level in range(self.count(part, shape)):
            start = next(drawn) % SPREAD
            if part == "a":
                yield self._columns[level][start : start + (shape[1] >> level + 1)]
            else:
                rank, stop = shape[1], start + (shape[0] >> level + 1)
                yield self._rows[rank][level][start * rank : stop * rank]


def _signs(count: int, name: str) -> Tensor:
    """Return ``count`` signs, fp32: the bits of a SHAKE-256 stream."""
    stream = hashlib.shake_256(name.encode()).digest(count // 8 + 1)
    octets = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    bits = octets[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)).bitwise_and(1)
    return bits.flatten()[:count].float().mul_(2).sub_(1)


def _numbers(seed: int) -> Iterator[int]:
    """Yield whole numbers below 2**64 without end."""
    block = 0
    while True:
        stream = hashlib.shake_256(f"places {seed} {block}".encode()).digest(1 << 13)
        for start in range(0, len(stream), 8):
            yield int.from_bytes(stream[start : start + 8], "little")
        block += 1

"""Updates whose inner products are taken while they wait, carried to the current version.

Only a flush makes a version: what holds when an upload arrives, its map included, holds at its
flush. A map is linear and belongs to a version, so the step needs it once for a version's weighted
sum, not once for an update; and the flush itself reads every update once, for that sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, AdapterLayout, require_same_layout
from alignfed.core.aggregation.carrying import Run, carried_products
from alignfed.core.aggregation.held import Pair
from alignfed.core.aggregation.sketching import sketched_products, sketching
from alignfed.core.alignment import RankMap, rank_maps
from alignfed.core.ports import BufferedUpdate

FEWEST = 4
"""Uploads that wait at least until they are compared."""

SKETCHED_FROM = 8
"""An adapter is sketched if it has at least so many times as many elements as its sketch."""

SMALL = 1e-4
"""Updates shorter than this share of their base are subtracted before they are sketched."""


@dataclass(slots=True)
class ComparedUpdates:
    """The buffered adapters in order of arrival, and what is known of the angles between them.

    Attributes:
        pairs: ``(update, base)``; nothing is copied.
        entries: what else is known of each.
        grams: inner products of the first k carried updates, fp64, shape ``(2, k, k)``: over LoRA
            factors, and over dense tensors. None while k is 0.
        maps: by stale base version, the rank-space maps of all modules in one flat tensor.
        sketches: of the first carried updates, as ``Sketching.sketch`` returns them; empty where
            inner products are exact.
        origins: by base version, the sketch of the base, carried as its updates are.
    """

    pairs: list[Pair] = field(default_factory=list)
    entries: list[BufferedUpdate] = field(default_factory=list)
    grams: Tensor | None = None
    maps: dict[int, Tensor] = field(default_factory=dict)
    sketches: list[Tensor] = field(default_factory=list)
    origins: dict[int, Tensor] = field(default_factory=dict)

    @property
    def compared(self) -> int:
        """How many are compared already: the first so many."""
        return 0 if self.grams is None else self.grams.shape[1]

    @property
    def is_due(self) -> bool:
        """Whether as many wait as were compared before.

        Those before are read and mapped again each time, and many rows are multiplied faster than
        one: so buffers are compared at 4, 8, 16, 32, ... uploads. All of it costs less than twice
        one comparison of everything at the flush, which is left with half of the buffer at most.
        """
        return len(self.entries) - self.compared >= max(FEWEST, self.compared)


@dataclass(frozen=True, slots=True)
class Carried:
    """A flush's updates at the current version, by their inner products.

    Attributes:
        gram: shape ``(K, K)``, fp64.
        shortened: for each update, what its LoRA part is multiplied by, so that no map makes it
            longer.
    """

    gram: Tensor
    shortened: tuple[float, ...]


def gather(
    gathered: ComparedUpdates | None, entry: BufferedUpdate, update: Adapter, base: Adapter
) -> ComparedUpdates:
    """Return what is gathered with one more upload, not compared yet."""
    gathered = gathered or ComparedUpdates()
    gathered.pairs.append((update, base))
    gathered.entries.append(entry)
    return gathered


def is_sketched(current: Adapter, buckets: int) -> bool:
    """Return whether updates of an adapter are compared by sketches of so many buckets."""
    return 0 < SKETCHED_FROM * buckets <= sum(current.layout.sizes.values())


def compare_ahead(
    gathered: ComparedUpdates, current: Adapter, ridge: float | None, buckets: int
) -> None:
    """Do what need not wait for the flush: see ``compare_all``."""
    if is_sketched(current, buckets):
        sketch(gathered, current, ridge, buckets)
    elif gathered.is_due:
        compare(gathered, current, ridge)


def compare_all(
    gathered: ComparedUpdates, current: Adapter, ridge: float | None, buckets: int
) -> Carried:
    """Return the inner products of all uploads, as far as they are not known yet.

    Args:
        gathered: changed in place.
        current: the current version's adapter.
        ridge: damping of the maps, relative; None carries nothing.
        buckets: numbers in a sketch; small adapters are compared exactly, and all with 0.

    Raises:
        AdapterError: the layouts differ: factors of unequal rank cannot be compared.
    """
    if is_sketched(current, buckets):
        sketch(gathered, current, ridge, buckets)
        compare_sketches(gathered)
    else:
        compare(gathered, current, ridge)
    return carried(gathered)


def compare(gathered: ComparedUpdates, current: Adapter, ridge: float | None) -> None:
    """Compare the uploads that wait with each other and with all before them, exactly."""
    first, entries = gathered.compared, gathered.entries
    if first == len(entries):
        return
    for position in range(first, len(entries)):
        _find_maps(gathered, position, current, ridge)
    # Updates of one version side by side; those that wait come last.
    order = sorted(range(len(entries)), key=lambda i: (i >= first, entries[i].base_version, i))
    updates = [gathered.pairs[i][0] for i in order]
    new = carried_products(updates, _runs(gathered, order, current.layout), first, current.layout)
    grams = new.new_zeros(2, len(entries), len(entries))
    if gathered.grams is not None:
        grams[:, :first, :first] = gathered.grams
    places = torch.tensor(order)
    grams[:, places[first:, None], places] = new
    grams[:, places[:, None], places[first:]] = new.transpose(1, 2)
    gathered.grams = grams


def sketch(gathered: ComparedUpdates, current: Adapter, ridge: float | None, buckets: int) -> None:
    """Sketch the uploads that wait, each carried to the current version.

    A sketch is linear, so that an upload is read without its base, whose sketch is taken once for a
    version. That costs digits: what is summed, in fp32, is as large as the adapter. The sketch of
    an update is off by ``1e-6 |base| / |update|`` of its length or less; where that could be seen
    the difference is taken first.
    """
    method = sketching(current.layout, buckets)
    for position in range(len(gathered.sketches), len(gathered.entries)):
        _find_maps(gathered, position, current, ridge)
        entry, (update, base) = gathered.entries[position], gathered.pairs[position]
        version = entry.base_version
        flat = gathered.maps.get(version)
        maps = {} if flat is None else map_views(flat, current.layout)
        origin = gathered.origins.get(version)
        if origin is None:
            origin = gathered.origins[version] = method.sketch(base, maps)
        if entry.norm < SMALL * float(origin.norm()):
            gathered.sketches.append(method.sketch(update, maps, base))
        else:
            gathered.sketches.append(method.sketch(update, maps).sub_(origin))


def compare_sketches(gathered: ComparedUpdates) -> None:
    """Take all inner products from sketches.

    The length of an update that no map has changed is known exactly, and its row and column are
    scaled to it.
    """
    grams = sketched_products(gathered.sketches)
    found = (grams[0] + grams[1]).diagonal().sqrt()
    exact = [
        math.nan if entry.base_version in gathered.maps else entry.norm
        for entry in gathered.entries
    ]
    scales = (found.new_tensor(exact) / found).nan_to_num(1.0, 1.0, 1.0)
    gathered.grams = grams * scales[:, None] * scales


def carried(gathered: ComparedUpdates) -> Carried:
    """Return the inner products of compared updates, none longer than before it was carried.

    Growth would come from directions in which the current factors are weak, where the
    least-squares answer is mostly noise (see ``apply_rank_maps``).
    """
    assert gathered.grams is not None, "nothing was compared"
    assert gathered.compared == len(gathered.entries), "some uploads were not compared"
    lora, dense = gathered.grams
    shortened = tuple(
        _shortened(entry.norm, float(dense[i, i]), float(lora[i, i]))
        if entry.base_version in gathered.maps
        else 1.0
        for i, entry in enumerate(gathered.entries)
    )
    scales = lora.new_tensor(shortened)
    return Carried(lora * scales[:, None] * scales + dense, shortened)


def map_views(flat: Tensor, layout: AdapterLayout) -> dict[str, RankMap]:
    """Return one version's maps by module, as views; the layout names them in the same order."""
    ranks = [shape.rank for _, shape in layout.lora for _ in ("left", "right")]
    sides = torch.split(flat, [rank**2 for rank in ranks])
    squares = iter([side.view(rank, rank) for side, rank in zip(sides, ranks, strict=True)])
    return {name: RankMap(next(squares), next(squares)) for name, _ in layout.lora}


def _find_maps(
    gathered: ComparedUpdates, position: int, current: Adapter, ridge: float | None
) -> None:
    """Make sure that the maps of an upload's version are there, if it needs any."""
    entry, (update, base) = gathered.entries[position], gathered.pairs[position]
    require_same_layout(current, update)
    require_same_layout(current, base)
    if ridge is not None and entry.staleness > 0 and entry.base_version not in gathered.maps:
        gathered.maps[entry.base_version] = _flat(rank_maps(base, current, ridge))


def _runs(gathered: ComparedUpdates, order: Sequence[int], layout: AdapterLayout) -> list[Run]:
    views = {version: map_views(flat, layout) for version, flat in gathered.maps.items()}
    versions = [gathered.entries[i].base_version for i in order]
    starts = [n for n in range(len(order)) if n == 0 or versions[n] != versions[n - 1]]
    return [
        Run(start, stop, gathered.pairs[order[start]][1], views.get(versions[start], {}))
        for start, stop in zip(starts, [*starts[1:], len(order)], strict=True)
    ]


def _shortened(before: float, dense_square: float, lora_square: float) -> float:
    """Return what keeps an update carried to ``lora_square`` within its length before."""
    allowed = before**2 - dense_square
    if not (math.isfinite(allowed) and math.isfinite(lora_square) and lora_square > 0):
        return 1.0
    return min(1.0, math.sqrt(max(0.0, allowed) / lora_square))


def _flat(maps: Mapping[str, RankMap]) -> Tensor:
    return torch.cat([side.flatten() for one in maps.values() for side in (one.left, one.right)])

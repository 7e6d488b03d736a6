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

from alignfed.core.adapter import Adapter, AdapterLayout, Term, pieces, require_same_layout
from alignfed.core.aggregation.carrying import Run, carried_products
from alignfed.core.aggregation.held import Pair
from alignfed.core.alignment import RankMap, rank_maps, replay_errors, replay_grams
from alignfed.core.grouping import group_by_version
from alignfed.core.ports import BufferedUpdate

FEWEST = 4
"""Uploads that wait at least until they are compared."""

PIECE = 1 << 16
"""Elements of the step that are summed at a time."""


@dataclass(slots=True)
class ComparedUpdates:
    """The buffered adapters in order of arrival, and what is known of the angles between them.

    Attributes:
        pairs: ``(update, base)``; nothing is copied.
        entries: what else is known of each.
        grams: inner products of the first k carried updates, fp64, shape ``(2, k, k)``: over LoRA
            factors, and over dense tensors. None while k is 0.
        maps: by stale base version, the rank-space maps of all modules in one flat tensor.
    """

    pairs: list[Pair] = field(default_factory=list)
    entries: list[BufferedUpdate] = field(default_factory=list)
    grams: Tensor | None = None
    maps: dict[int, Tensor] = field(default_factory=dict)

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


def compare(gathered: ComparedUpdates, current: Adapter, ridge: float | None) -> None:
    """Compare the uploads that wait with each other and with all before them.

    Args:
        gathered: changed in place.
        current: the current version's adapter.
        ridge: damping of the maps, relative; None carries nothing.

    Raises:
        AdapterError: the layouts differ: factors of unequal rank cannot be compared.
    """
    first, entries = gathered.compared, gathered.entries
    if first == len(entries):
        return
    for entry, (update, base) in zip(entries[first:], gathered.pairs[first:], strict=True):
        require_same_layout(current, update)
        require_same_layout(current, base)
        if ridge is not None and entry.staleness > 0 and entry.base_version not in gathered.maps:
            gathered.maps[entry.base_version] = _flat(rank_maps(base, current, ridge))
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


def step_of(
    gathered: ComparedUpdates,
    coefficients: Sequence[float],
    shortened: Sequence[float],
    current: Adapter,
) -> tuple[list[Tensor], Mapping[str, float]]:
    """Return the weighted sum of the carried updates, and what to record of the maps.

    The sum is fp32, one tensor for each flat buffer; empty if nothing moves. ``alignment_gain`` is
    the share of the first-order replay error of each version's sum that its map removes (see
    ``replay_errors``).

    Args:
        gathered: the updates.
        coefficients: of each.
        shortened: as ``carried`` returned them.
        current: the current version's adapter.
    """
    sizes = current.layout.sizes
    totals: list[Tensor] = []
    scratch: list[Tensor] = []
    without = aligned = 0.0
    versions = [entry.base_version for entry in gathered.entries]
    for version, positions in group_by_version(versions).items():
        terms = [
            (coefficients[i] * shortened[i], gathered.pairs[i][0])
            for i in positions
            if gathered.entries[i].norm > 0 and coefficients[i] != 0
        ]
        if not terms:  # every bit stays as it is
            continue
        if not totals:
            totals = _zeros(current)
        base = gathered.pairs[positions[0]][1]
        if version not in gathered.maps:
            _add_differences(totals, terms, base)
            continue
        scratch = [part.zero_() for part in scratch] or _zeros(current)
        _add_differences(scratch, terms, base)
        factors = {i: coefficients[i] * (1.0 - shortened[i]) for i in positions}
        _restore_dense(scratch, gathered, factors)
        maps = _views(gathered.maps[version], current.layout)
        raw = Adapter(current.layout, dict(zip(sizes, scratch, strict=True)))
        errors = replay_errors(replay_grams(maps, base, current), raw)
        without, aligned = without + errors[0], aligned + errors[1]
        _add_carried(totals, raw, maps)
    return totals, {"alignment_gain": 1.0 - math.sqrt(aligned / without)} if without > 0 else {}


def _zeros(current: Adapter) -> list[Tensor]:
    return [
        torch.zeros_like(current.buffers[dtype], dtype=torch.float32)
        for dtype in current.layout.sizes
    ]


def _add_differences(totals: Sequence[Tensor], terms: Sequence[Term], base: Adapter) -> None:
    """Add ``sum_j c_j (update_j - base)``, a piece of everything at a time, in cache."""
    for total, (dtype, old) in zip(totals, _in_order(base), strict=True):
        room = torch.empty(min(PIECE, total.numel()), dtype=torch.float32, device=total.device)
        updates = [(c, pieces(update.buffers[dtype], PIECE)) for c, update in terms]
        for number, (part, before) in enumerate(
            zip(pieces(total, PIECE), pieces(old, PIECE), strict=True)
        ):
            delta = room[: part.numel()]
            for coefficient, cut in updates:
                # The difference first: what did not move, A under FFA-LoRA, adds an exact zero.
                if dtype is torch.float32:
                    torch.sub(cut[number], before, out=delta)
                else:
                    delta.copy_(cut[number]).sub_(before)
                part.add_(delta, alpha=coefficient)


def _in_order(adapter: Adapter) -> list[tuple[torch.dtype, Tensor]]:
    return [(dtype, adapter.buffers[dtype]) for dtype in adapter.layout.sizes]


def _runs(gathered: ComparedUpdates, order: Sequence[int], layout: AdapterLayout) -> list[Run]:
    views = {version: _views(flat, layout) for version, flat in gathered.maps.items()}
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


def _restore_dense(
    sums: Sequence[Tensor], gathered: ComparedUpdates, factors: Mapping[int, float]
) -> None:
    """Add what shortening took off dense tensors: it is meant for LoRA factors alone."""
    layout = gathered.pairs[0][1].layout
    totals = dict(zip(layout.sizes, sums, strict=True))
    for _, part, dtype, shape, offset in layout.slices:
        if part != "dense":
            continue
        piece = slice(offset, offset + math.prod(shape))
        for i, factor in factors.items():
            if factor != 0:
                update, base = (one.buffers[dtype][piece].float() for one in gathered.pairs[i])
                totals[dtype][piece].add_(update - base, alpha=factor)


def _add_carried(totals: Sequence[Tensor], raw: Adapter, maps: Mapping[str, RankMap]) -> None:
    """Add a version's sum to the step, each module through its map."""
    layout = raw.layout
    step = Adapter(layout, dict(zip(layout.sizes, totals, strict=True)))
    for name, factors in raw.lora.items():
        step.lora[name].a.addmm_(maps[name].left, factors.a)
        step.lora[name].b.addmm_(factors.b, maps[name].right)
    for name, tensor in raw.dense.items():
        step.dense[name].add_(tensor)


def _flat(maps: Mapping[str, RankMap]) -> Tensor:
    return torch.cat([side.flatten() for one in maps.values() for side in (one.left, one.right)])


def _views(flat: Tensor, layout: AdapterLayout) -> dict[str, RankMap]:
    """Return one version's maps by module, as views; the layout names them in the same order."""
    found, offset = {}, 0
    for name, shape in layout.lora:
        square = flat[offset : offset + 2 * shape.rank**2].view(2, shape.rank, shape.rank)
        found[name] = RankMap(square[0], square[1])
        offset += 2 * shape.rank**2
    return found

"""The step of updates that were compared while they waited: each version's sum is carried once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, Term, pieces
from alignfed.core.aggregation.compared import ComparedUpdates, map_views
from alignfed.core.alignment import RankMap, replay_errors, replay_grams
from alignfed.core.grouping import group_by_version

PIECE = 1 << 18
"""Elements of the step that are summed at a time."""

TOGETHER = 4
"""Updates of a version that are averaged at a time, where they are sketched.

A mean of adapters is rounded as their elements are, and not as their differences: by some units in
the last place of what it is added to. It spares one pass in cache of the two for each update.
"""


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
    together = TOGETHER if gathered.sketches else 1
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
            _add_differences(totals, terms, base, together)
            continue
        scratch = [part.zero_() for part in scratch] or _zeros(current)
        _add_differences(scratch, terms, base, together)
        factors = {i: coefficients[i] * (1.0 - shortened[i]) for i in positions}
        _restore_dense(scratch, gathered, factors)
        maps = map_views(gathered.maps[version], current.layout)
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


def _add_differences(
    totals: Sequence[Tensor], terms: Sequence[Term], base: Adapter, together: int
) -> None:
    """Add ``sum_j c_j (update_j - base)``, a piece of everything at a time, in cache.

    So many updates as ``together`` says are averaged before the base is subtracted.
    """
    for total, (dtype, old) in zip(totals, _in_order(base), strict=True):
        room = torch.empty(min(PIECE, total.numel()), dtype=torch.float32, device=total.device)
        updates = [(c, pieces(update.buffers[dtype], PIECE)) for c, update in terms]
        several = together if dtype is torch.float32 else 1
        groups = [updates[i : i + several] for i in range(0, len(updates), several)]
        for number, (part, before) in enumerate(
            zip(pieces(total, PIECE), pieces(old, PIECE), strict=True)
        ):
            delta = room[: part.numel()]
            for (share, cut), *others in groups:
                mean = cut[number]
                for coefficient, more in others:
                    share += coefficient
                    weight = coefficient / share if share > 0 else 0.0
                    mean = torch.lerp(mean, more[number], weight, out=delta)
                # What did not move, A under FFA-LoRA, is its own mean, and adds an exact zero.
                if dtype is torch.float32:
                    torch.sub(mean, before, out=delta)
                else:
                    delta.copy_(mean).sub_(before)
                part.add_(delta, alpha=share)


def _in_order(adapter: Adapter) -> list[tuple[torch.dtype, Tensor]]:
    return [(dtype, adapter.buffers[dtype]) for dtype in adapter.layout.sizes]


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

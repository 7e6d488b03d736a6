"""Which alignment a flush needs: one set of maps for each stale base version in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, difference, zeros_like
from alignfed.core.aggregation.held import Pair
from alignfed.core.agreement import factor_gram
from alignfed.core.algebra import innovation, product_gram
from alignfed.core.alignment import (
    ActivationMap,
    activation_gain,
    activation_maps,
    apply_activation_maps,
    apply_rank_maps,
    rank_maps,
    replay_errors,
    replay_grams,
)
from alignfed.core.grouping import group_by_version
from alignfed.core.lora import space_of
from alignfed.core.ports import Calibrator, Flush
from alignfed.errors import RuleError

Maps = Mapping[str, ActivationMap]


@dataclass(frozen=True, slots=True)
class Transport:
    """A flush's updates after alignment.

    Attributes:
        pairs: ``(update, base)`` for each buffered update, in order; what counts is what lies
            between the two.
        notes: what to record of the maps.
        forwards: calibration mini-batches sent forward.
        origin: the base of pairs that were made differences, zero throughout.
    """

    pairs: tuple[tuple[Adapter, Adapter], ...]
    notes: Mapping[str, float]
    forwards: int
    origin: Adapter | None = None


def require_calibrator(flush: Flush) -> Calibrator:
    """Return the flush's calibrator.

    Raises:
        RuleError: the server holds no calibration mini-batch.
    """
    if flush.calibrator is None:
        raise RuleError(
            "alignment by calibration activations needs a calibration set and the server has none;"
            ' give one, or set alignment_map="rank" or alignment=false'
        )
    return flush.calibrator


def carry(
    flush: Flush, pairs: list[Pair], *, kind: str, ridge: float, max_positions: int
) -> Transport:
    """Return the flush's updates, the stale ones carried to the current version.

    Where the LoRA rule adds products, an innovation is exact whatever its base's factors were, and
    rank-space maps have nothing to correct: only the activation map applies, to both sides of
    the pair, ``D M^T``. Where it adds factors, an aligned pair is ``(delta', 0)``.

    Args:
        flush: the flush.
        pairs: its updates and their bases, in order; changed.
        kind: ``none``, ``rank``, ``activation`` or ``both``.
        ridge: damping of the maps, relative.
        max_positions: positions used to fit activation maps.

    Raises:
        RuleError: activation maps are asked for and the flush has no calibrator.
        AdapterError: an update and its base have different layouts, and factors are added.
    """
    groups = group_by_version([entry.base_version for entry in flush.updates])
    stale = [positions for version, positions in groups.items() if version != flush.version]
    exact = space_of(flush.lora) == "product"
    if not stale or kind == "none" or (exact and kind == "rank"):
        return Transport(tuple(pairs), {}, 0)
    notes: dict[str, float] = {}
    maps: list[Maps] = [{} for _ in stale]
    forwards = 0
    if kind != "rank":
        maps, notes = _fit_activations(flush, pairs, stale, ridge, max_positions)
        forwards = 1 + len(stale)
    without = aligned = 0.0
    origin = zeros_like(flush.adapter)
    for found, positions in zip(maps, stale, strict=True):
        if exact:
            for position in positions:
                update, base = (adapter.to(torch.float32) for adapter in pairs[position])
                pairs[position] = (
                    apply_activation_maps(found, update),
                    apply_activation_maps(found, base),
                )
            continue
        base = pairs[positions[0]][1]
        seen_base = apply_activation_maps(found, base) if found else base
        turns = rank_maps(seen_base, flush.adapter, ridge) if kind != "activation" else None
        grams = replay_grams(turns, seen_base, flush.adapter) if turns is not None else {}
        for position in positions:
            delta = difference(*pairs[position])
            carried = seen = apply_activation_maps(found, delta) if found else delta
            if turns is not None:
                carried, shortened = apply_rank_maps(turns, seen)
                errors = replay_errors(grams, seen, shortened)
                without, aligned = without + errors[0], aligned + errors[1]
            pairs[position] = (carried, origin)
    if without > 0:
        notes = {**notes, "alignment_gain": 1.0 - math.sqrt(aligned / without)}
    return Transport(tuple(pairs), notes, forwards, origin)


def _fit_activations(
    flush: Flush,
    pairs: list[Pair],
    stale: list[tuple[int, ...]],
    ridge: float,
    max_positions: int,
) -> tuple[list[Maps], dict[str, float]]:
    calibrator = require_calibrator(flush)
    now = calibrator.inputs(flush.adapter)
    maps: list[Maps] = []
    without = aligned = 0.0
    for positions in stale:
        before: Mapping[str, Tensor] = calibrator.inputs(pairs[positions[0]][1])
        found = activation_maps(before, now, ridge, max_positions)
        errors = activation_gain(found, before, max_positions)
        without, aligned = without + errors[0], aligned + errors[1]
        maps.append(found)
    if without == 0:
        return maps, {}
    return maps, {"activation_gain": 1.0 - math.sqrt(aligned / without)}


def gram_of(pairs: Sequence[Pair], space: str, origin: Adapter | None) -> Tensor:
    """Return the inner products of ``update - base`` over all pairs, in factors or in products."""
    if space == "factor":
        # What was aligned is a difference already: its base is zero throughout.
        return factor_gram(
            [update for update, _ in pairs],
            [None if base is origin else base for _, base in pairs],
        )
    return product_gram([innovation(update, base) for update, base in pairs])

"""What AlignFed remembers between flushes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from alignfed.core.aggregation.path import Path
from alignfed.core.aggregation.recall import Recall
from alignfed.core.ports import Flush

REMEMBERED_NORMS = 32
"""Lengths of past updates kept as a measure for the next ones."""

REMEMBERED_STALENESS = 64
"""Applied updates whose mean staleness counts as usual."""


@dataclass(frozen=True, slots=True)
class AlignFedState:
    """What AlignFed remembers between flushes.

    Attributes:
        trust: what the guard multiplies the next step by before trying it.
        ceiling: the most it may be, since longer steps led no further.
        rested: flushes since that changed, or since a mean of versions was taken.
        scales: what the guard multiplied the last steps by.
        norms: lengths (after clipping) of the last updates.
        staleness: of the last updates.
        calibrated_version: server version whose calibration loss is known (-1: none).
        calibration_loss: that loss, in nats.
        losses: calibration losses before the last flushes, twice as far as the guard looks back.
        path: the last versions' mean; None: the next flush begins one, if any is wanted.
        valley: calibration loss of the mean taken last; minus infinity: none was.
        recall: what clients said last.
    """

    trust: float = 1.0
    ceiling: float = 1.0
    rested: int = 0
    scales: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    staleness: tuple[int, ...] = ()
    calibrated_version: int = -1
    calibration_loss: float = 0.0
    losses: tuple[float, ...] = ()
    path: Path | None = None
    valley: float = -math.inf
    recall: Recall = field(default_factory=Recall)


def seen_staleness(state: AlignFedState, flush: Flush) -> tuple[int, ...]:
    """Return the staleness of the last applied updates, those of the flush included."""
    seen = (*state.staleness, *(entry.staleness for entry in flush.updates))
    return seen[-REMEMBERED_STALENESS:]

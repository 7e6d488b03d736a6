"""The guard: a server step is shortened until the held calibration loss accepts it.

A step that adds up what stale clients say can overshoot, and nothing in the updates themselves
tells. The calibration loss does: forward passes only, one for each step tried.

It asks two questions. Does the step harm? A loss that is not above the highest of the last few
versions', by more than ``tolerance``, is none (a non-monotone line search; Grippo, Lampariello and
Lucidi 1986): where clients hold a few classes each, what helps in the long run harms first. And
does it overshoot, is
half of it better by more than ``margin``? It never looks for the best step: on the way down the
step that helps most at once is far too short (a tenth of the one that gets there first, measured on
Banking77; see docs/log.md), so a shorter one is taken only where it is clearly better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from alignfed.core.adapter import Adapter
from alignfed.core.ports import Calibrator


@dataclass(frozen=True, slots=True)
class GuardedStep:
    """The step taken.

    Attributes:
        adapter: where it leads.
        scale: what the proposed step was multiplied by; 0 where every step tried did harm.
        loss: calibration loss there, in nats.
        tried_scale: the scale of the step taken, or the last one given up.
        forwards: calibration mini-batches sent forward, one for each step tried.
        halvings: how often the step was shortened.
    """

    adapter: Adapter
    scale: float
    loss: float
    tried_scale: float
    forwards: int
    halvings: int


def guarded_step(
    current: Adapter,
    candidate: Callable[[float], Adapter],
    calibrator: Calibrator,
    *,
    loss_before: float,
    highest: float,
    scale: float,
    tolerance: float,
    margin: float,
    max_backtracks: int,
) -> GuardedStep:
    """Return the first of the steps ``scale, scale / 2, ...`` that neither harms nor overshoots.

    A step harms whose calibration loss is not finite, or above ``highest`` by more than the share
    ``tolerance`` of it. It overshoots if half of it has a loss lower by more than the share
    ``margin`` of ``loss_before``. Where ``loss_before`` itself is not finite, any finite loss is
    better, and nothing overshoots.

    Args:
        current: the adapter before the step; the result where every step tried does harm.
        candidate: returns where a step of a given scale leads.
        calibrator: measures losses.
        loss_before: calibration loss of ``current``.
        highest: the greatest calibration loss that is still no harm, ``loss_before`` or above.
        scale: of the first step tried.
        tolerance: see above.
        margin: see above; infinity never asks, and saves the forward pass.
        max_backtracks: halvings at most.
    """
    limit = highest + tolerance * abs(highest)
    better_by = margin * abs(loss_before)
    forwards = halvings = 0

    def tried(length: float) -> tuple[Adapter, float]:
        nonlocal forwards
        forwards += 1
        adapter = candidate(length)
        return adapter, calibrator.loss(adapter) if adapter.is_finite() else math.inf

    def harms(loss: float) -> bool:
        return not math.isfinite(loss) or loss > limit

    adapter, loss = tried(scale)
    while halvings < max_backtracks and (harms(loss) or math.isfinite(better_by)):
        half, half_loss = tried(scale / 2)
        if not harms(loss) and not half_loss < loss - better_by:
            break
        adapter, loss, scale, halvings = half, half_loss, scale / 2, halvings + 1
    if harms(loss):
        return GuardedStep(current, 0.0, loss_before, scale, forwards, halvings)
    return GuardedStep(adapter, scale, loss, scale, forwards, halvings)

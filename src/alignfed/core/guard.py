"""The guard: a server step is shortened until the held calibration loss accepts it.

A step that adds up what stale clients say can overshoot, and nothing in the updates themselves
tells. The calibration loss does: forward passes only, one for each step tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from alignfed.core.adapter import Adapter
from alignfed.core.instructions import ServerWork
from alignfed.core.ports import Calibrator, Step


@dataclass(frozen=True, slots=True)
class GuardedStep:
    """The step taken.

    Attributes:
        adapter: where it leads.
        scale: what the proposed step was multiplied by; 0 where every step tried did harm.
        loss: calibration loss there, in nats.
        tried_scale: the last scale tried.
        forwards: calibration mini-batches sent forward, one for each step tried.
    """

    adapter: Adapter
    scale: float
    loss: float
    tried_scale: float
    forwards: int


def guarded_step(
    current: Adapter,
    candidate: Callable[[float], Adapter],
    calibrator: Calibrator,
    *,
    loss_before: float,
    scale: float,
    tolerance: float,
    max_backtracks: int,
) -> GuardedStep:
    """Return the first of the steps ``scale, scale / 2, ...`` that does no harm, else no step.

    Harm is a calibration loss that is not finite, or above ``loss_before`` by more than the share
    ``tolerance`` of it. Where ``loss_before`` itself is not finite, any finite loss is better.
    """
    limit = loss_before + tolerance * abs(loss_before)
    for tried in range(max_backtracks + 1):
        adapter = candidate(scale)
        loss = calibrator.loss(adapter) if adapter.is_finite() else math.inf
        if math.isfinite(loss) and not loss > limit:
            return GuardedStep(adapter, scale, loss, scale, tried + 1)
        scale /= 2
    return GuardedStep(current, 0.0, loss_before, scale * 2, max_backtracks + 1)


def refused_step(step: Step, adapter: Adapter) -> Step:
    """Return no step instead of one with NaN or infinite elements; its notes say so."""
    return Step(
        adapter=adapter,
        weights=tuple(0.0 for _ in step.weights),
        notes={
            **{name: value for name, value in step.notes.items() if math.isfinite(value)},
            "step_refused": 1.0,
        },
        work=ServerWork(step.work.bytes_moved, step.work.calibration_tokens),
    )

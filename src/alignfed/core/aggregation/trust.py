"""How long a step AlignFed takes: the guard's answer, and what is kept of it for the next flush."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

from alignfed.core.adapter import Adapter
from alignfed.core.aggregation.alignfed_state import AlignFedState
from alignfed.core.guard import GuardedStep, guarded_step
from alignfed.core.ports import Calibrator, Flush

GROWTH = 5.0
"""A step that needed no halving lets the next one start longer by this share over the usual
staleness, at most twice as long: what a longer step does is only seen in full that much later."""

LEAST_TRUST = 2.0**-6
"""Shortest step the guard starts from; shorter ones would not be worth an upload."""


@dataclass(frozen=True, slots=True)
class Trusted:
    """A guarded step.

    Attributes:
        step: what the guard took.
        state: the state after it.
        forwards: calibration mini-batches sent forward.
        notes: what to record.
    """

    step: GuardedStep
    state: AlignFedState
    forwards: int
    notes: Mapping[str, float]


def growth(staleness: float) -> float:
    """Return what the next step's first length is multiplied by after one that needed no halving.

    Args:
        staleness: mean staleness of the updates applied lately, in versions.
    """
    return 1.0 + min(1.0, GROWTH / staleness) if staleness > 0 else 2.0


def trusted_step(
    state: AlignFedState,
    flush: Flush,
    calibrator: Calibrator,
    candidate: Callable[[float], Adapter],
    *,
    tolerance: float,
    margin: float,
    window: int,
    max_backtracks: int,
) -> Trusted:
    """Return the step as long as the calibration loss lets it be, starting from the last trust.

    Args:
        state: the state before the flush, but with the staleness of its updates.
        flush: the flush.
        calibrator: measures losses.
        candidate: returns the adapter that a multiple of the step leads to.
        tolerance: rise of the loss accepted, as a share of it.
        margin: what half a step must be better by to be taken instead, as a share of the loss.
        window: flushes whose highest loss a step is measured against.
        max_backtracks: halvings before a step is given up.
    """
    before, forwards = state.calibration_loss, 0
    if state.calibrated_version != flush.version:
        before, forwards = calibrator.loss(flush.adapter), 1
    losses = (*state.losses, before)[-window:]
    guarded = guarded_step(
        flush.adapter,
        candidate,
        calibrator,
        loss_before=before,
        highest=max((loss for loss in losses if math.isfinite(loss)), default=before),
        scale=state.trust,
        tolerance=tolerance,
        margin=margin,
        max_backtracks=max_backtracks,
    )
    trust = guarded.tried_scale
    if guarded.scale == 0:
        trust /= 2
    elif guarded.halvings == 0:
        trust = min(1.0, trust * growth(fmean(state.staleness)))
    known = math.isfinite(guarded.loss)
    measured = {"calibration_loss_before": before, "calibration_loss_after": guarded.loss}
    notes = {
        **{name: loss for name, loss in measured.items() if math.isfinite(loss)},
        "step_scale": guarded.scale,
        "backtracks": float(guarded.halvings),
    }
    state = replace(
        state,
        trust=max(LEAST_TRUST, trust),
        losses=losses if math.isfinite(before) else state.losses,
        calibrated_version=flush.version + 1 if known else -1,
        calibration_loss=guarded.loss if known else 0.0,
    )
    return Trusted(guarded, state, forwards + guarded.forwards, notes)

"""How long a step AlignFed takes: the guard's answer, and what is kept of it for the next flush.

Where the path of the last versions goes around a valley (``path.py``), the next version is the
mean that lies in it, and the next step begins at half its length. A valley that is no lower than
the one before says that steps of this length lead no further: a ceiling on them comes down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance

from alignfed.core.adapter import Adapter
from alignfed.core.aggregation.alignfed_state import AlignFedState
from alignfed.core.aggregation.path import LEAST_VERSIONS, in_valley, lead_on, swings
from alignfed.core.guard import GuardedStep, guarded_step
from alignfed.core.ports import Calibrator, Flush

GROWTH = 5.0
"""A step that needed no halving lets the next one start longer by this share over the usual
staleness, at most twice as long: what a longer step does is only seen in full that much later."""

EASING = 2.0
"""The ceiling rises by this factor with a valley lower than the last, and where the loss falls."""

MOST_WINDOW = 1024
"""Flushes at most whose mean loss is held against that of as many before."""

LEAST_TRUST = 2.0**-6
"""Shortest step the guard starts from; shorter ones would not be worth an upload."""


@dataclass(frozen=True, slots=True)
class Trusted:
    """A guarded step.

    Attributes:
        step: what the guard took, or the mean of the last versions in its place.
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


def falls(losses: Sequence[float], window: int) -> bool:
    """Return whether the last ``window`` losses lie below those before by more than they scatter.

    Below by less than the standard error of the difference of the two means is a standstill; so
    is what cannot be told, from too few losses or from some that are not finite.

    Args:
        losses: in order; the last ``2 * window`` count.
        window: how many make a mean, at least 2 to tell.
    """
    last, before = losses[-window:], losses[-2 * window : -window]
    if window < 2 or len(before) < window or not all(map(math.isfinite, (*last, *before))):
        return False
    error = math.sqrt((variance(last) + variance(before)) / window)
    return fmean(before) - fmean(last) > error


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
    averaging: bool = True,
) -> Trusted:
    """Return the step as long as the calibration loss lets it be, starting from the last trust.

    Args:
        state: the state before the flush, but with the staleness of its updates.
        flush: the flush.
        calibrator: measures losses.
        candidate: returns the adapter that a multiple of the step leads to.
        tolerance: rise of the loss accepted, as a share of it.
        margin: what half a step, or a mean of versions, must be better by to be taken instead, as
            a share of the loss.
        window: flushes whose highest loss a step is measured against.
        max_backtracks: halvings before a step is given up.
        averaging: whether the mean of the last versions may be taken in their place.
    """
    before, forwards = state.calibration_loss, 0
    if state.calibrated_version != flush.version:
        before, forwards = calibrator.loss(flush.adapter), 1
    # What a step does is seen in full only as many versions later as updates are stale.
    usual = fmean(state.staleness) if state.staleness else 0.0
    rest = min(MOST_WINDOW, window * max(1, round(usual / window)))
    losses = (*state.losses, before)[-max(2 * rest, LEAST_VERSIONS) :]
    guarded = guarded_step(
        flush.adapter,
        candidate,
        calibrator,
        loss_before=before,
        highest=max((loss for loss in losses[-window:] if math.isfinite(loss)), default=before),
        scale=state.trust,
        tolerance=tolerance,
        margin=margin,
        max_backtracks=max_backtracks,
    )
    trust = guarded.tried_scale
    if guarded.scale == 0:
        trust /= 2
    elif guarded.halvings == 0:
        trust *= growth(usual)
    scales = (*state.scales, guarded.scale)[-rest:]
    ceiling, rested = state.ceiling, state.rested + 1
    forwards += guarded.forwards
    path, valley = None, None
    if averaging:
        path = lead_on(state.path, flush.adapter, guarded.adapter, flush.lora, rest)
    on_path = (*losses, guarded.loss)[-path.versions :] if path else ()
    if path and swings(on_path):
        loss, forwards = calibrator.loss(path.mean), forwards + 1
        # Before a first valley nobody knows whether a way up leads over a hill.
        if in_valley(loss, on_path, margin if math.isfinite(state.valley) else math.inf):
            guarded, path, valley = replace(guarded, adapter=path.mean, loss=loss), None, loss
    if valley is not None:
        lower = valley < state.valley - margin * abs(valley)
        ceiling = min(1.0, ceiling * EASING) if lower else min(ceiling, fmean(scales)) / 2
        trust, rested = trust / 2, 0
    elif ceiling < 1.0 and rested >= rest and falls(losses, rest):
        ceiling, rested = min(1.0, ceiling * EASING), 0
    ceiling = max(LEAST_TRUST, ceiling)
    known = math.isfinite(guarded.loss)
    measured = {"calibration_loss_before": before, "calibration_loss_after": guarded.loss}
    notes = {
        **{name: loss for name, loss in measured.items() if math.isfinite(loss)},
        "step_scale": guarded.scale,
        "step_ceiling": ceiling,
        "averaged": float(valley is not None),
        "backtracks": float(guarded.halvings),
    }
    state = replace(
        state,
        trust=max(LEAST_TRUST, min(ceiling, trust)),
        ceiling=ceiling,
        rested=rested,
        path=path,
        valley=state.valley if valley is None else valley,
        scales=scales,
        losses=losses if math.isfinite(before) else state.losses,
        calibrated_version=flush.version + 1 if known else -1,
        calibration_loss=guarded.loss if known else 0.0,
    )
    return Trusted(guarded, state, forwards, notes)

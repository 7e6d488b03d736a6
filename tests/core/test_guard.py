"""The guard on a one-dimensional model whose calibration loss is its distance from one point."""

import math

import torch

from alignfed.core.adapter import Adapter
from alignfed.core.guard import GuardedStep, guarded_step


def at(position: float) -> Adapter:
    return Adapter.pack({}, {"x": torch.tensor([position])})


class Distance:
    """A calibrator whose loss is ``|x - 1|``."""

    tokens = 10

    def __init__(self) -> None:
        self.calls = 0

    def loss(self, adapter: Adapter) -> float:
        self.calls += 1
        return abs(float(adapter.dense["x"][0]) - 1.0)


def guarded(
    reach: float,
    *,
    tolerance: float = 0.0,
    before: float = 1.0,
    margin: float = math.inf,
    highest: float = 0.0,
) -> GuardedStep:
    calibrator = Distance()
    step = guarded_step(
        at(0.0),
        lambda scale: at(scale * reach),
        calibrator,
        loss_before=before,
        highest=max(before, highest),
        scale=1.0,
        tolerance=tolerance,
        margin=margin,
        max_backtracks=3,
    )
    assert calibrator.calls <= step.forwards
    return step


def test_a_step_that_helps_is_taken_whole_for_one_forward_pass():
    step = guarded(1.0)
    assert (step.scale, step.loss, step.forwards) == (1.0, 0.0, 1)


def test_a_step_that_harms_is_halved_until_it_does_not():
    step = guarded(7.0)
    assert (step.scale, step.forwards) == (0.25, 3)
    assert step.loss == 0.75


def test_harm_within_a_share_of_the_loss_is_accepted():
    assert guarded(2.1, tolerance=0.2).scale == 1.0
    assert guarded(2.1, tolerance=0.2, before=0.5).scale == 0.5
    assert guarded(2.1, tolerance=0.05).scale == 0.5


def test_a_step_that_harms_however_short_is_not_taken():
    step = guarded(-1.0)
    assert (step.scale, step.loss, step.forwards) == (0.0, 1.0, 4)
    assert float(step.adapter.dense["x"][0]) == 0.0
    assert step.tried_scale == 0.125


def test_a_step_to_nowhere_is_never_taken():
    step = guarded(math.inf)
    assert step.scale == 0.0
    assert step.adapter.is_finite()


def test_a_rise_below_what_was_seen_lately_is_no_harm():
    assert guarded(2.4, highest=1.5).scale == 1.0
    assert guarded(2.6, highest=1.5).scale == 0.5


def test_a_step_whose_half_is_clearly_better_overshoots():
    assert guarded(1.9, margin=0.5).scale == 0.5
    assert guarded(1.9, margin=0.9).scale == 1.0


def test_a_step_whose_half_is_a_little_better_is_taken_whole():
    step = guarded(1.3, margin=0.1)
    assert (step.scale, step.forwards, step.halvings) == (1.0, 2, 0)


def test_half_of_a_step_that_helps_all_the_way_is_never_taken():
    assert guarded(0.5, margin=0.0).scale == 1.0


def test_a_lost_model_accepts_any_finite_loss():
    assert guarded(50.0, before=math.nan, margin=0.1).scale == 1.0

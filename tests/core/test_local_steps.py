"""Local steps by device speed: all tasks compute about as long, within bounds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignfed.core.local_steps import ClientSpeeds, StepsBySpeed

SPEEDS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40)


def known(rule, speeds):
    state = ClientSpeeds()
    for client_id, step_s in enumerate(speeds):
        rule.learn(state, client_id, step_s)
    return state


@given(SPEEDS, st.integers(1, 100), st.floats(1.0, 10.0))
def test_steps_stay_within_one_and_the_spread_and_never_fall_with_speed(speeds, steps, spread):
    rule = StepsBySpeed(steps, spread)
    state = known(rule, speeds)
    given_steps = [rule.assign(state, client_id) for client_id in range(len(speeds))]
    assert all(1 <= one <= max(1, round(steps * spread)) for one in given_steps)
    by_speed = [n for _, n in sorted(zip(speeds, given_steps, strict=True), reverse=True)]
    assert by_speed == sorted(by_speed)


@given(SPEEDS)
def test_the_middle_client_takes_the_usual_steps(speeds):
    rule = StepsBySpeed(10)
    state = known(rule, speeds)
    middle = sorted(range(len(speeds)), key=speeds.__getitem__)[len(speeds) // 2]
    assert rule.assign(state, middle) == 10


def test_who_is_half_as_fast_takes_half_the_steps():
    rule = StepsBySpeed(10)
    state = known(rule, [1.0, 2.0, 0.5, 1.0, 1.0])
    assert [rule.assign(state, client_id) for client_id in range(5)] == [10, 5, 20, 10, 10]


def test_who_says_nothing_takes_the_usual_steps():
    rule = StepsBySpeed(10)
    state = known(rule, [1.0, 100.0])
    assert rule.assign(state, 7) == 10


@pytest.mark.parametrize("said", [None, 0.0, -1.0, math.inf, math.nan, "fast"])
def test_what_is_no_duration_changes_nothing(said):
    rule = StepsBySpeed(10)
    state = known(rule, [1.0, 2.0])
    rule.learn(state, 1, said)
    assert state == known(rule, [1.0, 2.0])


def test_a_changed_speed_is_taken_in_by_halves():
    rule = StepsBySpeed(8)
    state = known(rule, [1.0, 1.0, 1.0, 1.0])
    rule.learn(state, 3, 3.0)
    assert state.step_s[3] == 2.0
    assert rule.assign(state, 3) == 4

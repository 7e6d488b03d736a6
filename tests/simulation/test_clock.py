import math
from contextlib import closing
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignfed.errors import FleetError
from alignfed.simulation.clock import VirtualClock

TIMES = st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 1e9]), max_size=40)


def is_even(event):
    return event % 2 == 0


def put(clock, times, first=0):
    """Events are numbers; the even ones are expected."""
    for number, time_s in enumerate(times, first):
        (clock.expect if is_even(number) else clock.schedule)(time_s, number)


def look_ahead(clock, most):
    with closing(clock.ahead()) as ahead:
        return list(islice(ahead, most))


@given(TIMES)
def test_events_leave_by_time_and_ties_in_the_order_they_came(times):
    clock = VirtualClock()
    put(clock, times)
    left = [clock.pop() for _ in times]
    assert left == sorted(zip(times, range(len(times)), strict=True))


@given(TIMES, st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), TIMES), max_size=8))
def test_looking_ahead_tells_of_each_expected_event_once_and_moves_none(times, turns):
    plain, clock, told = VirtualClock(), VirtualClock(), []
    for one in (plain, clock):
        put(one, times)
    number = len(times)
    for most, popped, more in turns:
        expected = sorted(e for e in clock.pending() if is_even(e[2]) and e[2] not in told)
        found = look_ahead(clock, most)
        assert found == [event for _, _, event in expected[:most]]
        told += found
        for _ in range(min(popped, len(plain))):
            assert clock.pop() == plain.pop()
        for one in (plain, clock):
            put(one, [one.now_s + time_s for time_s in more], number)
        number += len(more)
        assert clock.pending() == plain.pending()
        assert len(clock) == len(plain)


@given(TIMES, st.integers(0, 40), st.integers(0, 10))
def test_a_restored_clock_goes_on_as_the_original(times, popped, looked):
    clock = VirtualClock()
    put(clock, times)
    look_ahead(clock, looked)
    for _ in range(min(popped, len(times))):
        clock.pop()
    again = VirtualClock.restore(clock.now_s, clock.sequence, clock.pending(), is_even)
    for one in (clock, again):
        one.schedule(one.now_s + 1.0, 1001)
        one.expect(one.now_s + 1.0, 1002)
    assert [clock.pop() for _ in range(len(clock))] == [again.pop() for _ in range(len(again))]


@pytest.mark.parametrize("time_s", [0.5, -1.0, math.inf, math.nan])
def test_the_past_and_times_that_are_not_finite_are_refused(time_s):
    clock = VirtualClock()
    clock.schedule(1.0, "first")
    clock.pop()
    for put_on in (clock.schedule, clock.expect):
        with pytest.raises(FleetError, match=r"1\.0 s"):
            put_on(time_s, "late")

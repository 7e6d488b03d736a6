import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignfed.errors import FleetError
from alignfed.simulation.clock import VirtualClock

TIMES = st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 1e9]), max_size=40)


@given(TIMES)
def test_events_leave_by_time_and_ties_in_the_order_they_came(times):
    clock = VirtualClock()
    for number, time_s in enumerate(times):
        clock.schedule(time_s, number)
    left = [clock.pop() for _ in times]
    assert left == sorted(zip(times, range(len(times)), strict=True))


@given(TIMES, st.integers(0, 40))
def test_a_restored_clock_goes_on_as_the_original(times, popped):
    clock = VirtualClock()
    for number, time_s in enumerate(times):
        clock.schedule(time_s, number)
    for _ in range(min(popped, len(times))):
        clock.pop()
    again = VirtualClock.restore(clock.now_s, clock.sequence, clock.pending())
    for one in (clock, again):
        one.schedule(one.now_s + 1.0, "late")
    assert [clock.pop() for _ in range(len(clock))] == [again.pop() for _ in range(len(again))]


@pytest.mark.parametrize("time_s", [0.5, -1.0, math.inf, math.nan])
def test_the_past_and_times_that_are_not_finite_are_refused(time_s):
    clock = VirtualClock()
    clock.schedule(1.0, "first")
    clock.pop()
    with pytest.raises(FleetError, match=r"1\.0 s"):
        clock.schedule(time_s, "late")

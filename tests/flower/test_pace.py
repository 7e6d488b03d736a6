from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from alignfed.flower.pace import Pace, PaceSettings


@given(st.lists(st.floats(0.0, 1e6), max_size=20))
def test_a_time_to_live_stays_within_its_bounds(durations: list[float]) -> None:
    pace = Pace(PaceSettings(first_ttl_s=500.0, min_ttl_s=30.0, max_ttl_s=1000.0))
    assert pace.ttl_s(1) == 500.0
    for duration_s in durations:
        pace.learn(1, duration_s)
        assert 30.0 <= pace.ttl_s(1) <= 1000.0
        assert pace.expected_s[1] >= duration_s


def test_a_device_that_becomes_faster_is_believed_by_and_by() -> None:
    pace = Pace(PaceSettings())
    pace.learn(1, 100.0)
    for _ in range(20):
        pace.learn(1, 10.0)
    assert 10.0 <= pace.expected_s[1] < 12.0


def test_clients_do_not_share_an_allowance() -> None:
    pace = Pace(PaceSettings(uploads_per_minute=2.0))
    assert [pace.admit(1, 0.0) for _ in range(3)] == [True, True, False]
    assert pace.admit(2, 0.0)


@given(st.lists(st.floats(0.0, 30.0), min_size=1, max_size=60))
def test_no_minute_admits_more_than_twice_the_rate(pauses: list[float]) -> None:
    pace, now_s, admitted = Pace(PaceSettings(uploads_per_minute=5.0)), 0.0, []
    for pause_s in pauses:
        now_s += pause_s
        if pace.admit(1, now_s):
            admitted.append(now_s)
    for since_s in admitted:
        assert sum(since_s <= at_s < since_s + 60.0 for at_s in admitted) <= 11


def test_a_task_of_more_steps_is_waited_for_longer_and_one_of_fewer_no_shorter() -> None:
    pace = Pace(PaceSettings(patience=5.0, word_ttl_s=90.0))
    pace.learn(1, 100.0, steps=4)
    assert pace.ttl_s(1, 4) == pace.ttl_s(1, 1) == 500.0
    assert pace.ttl_s(1, 12) == 1500.0
    assert pace.word_ttl_s(1) == pace.word_ttl_s(2) == 90.0

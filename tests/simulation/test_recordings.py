import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignfed.errors import FleetError
from alignfed.simulation.cost import TaskCost
from alignfed.simulation.draws import normal, uniform
from alignfed.simulation.fleet import Fleet
from alignfed.simulation.presets import preset_devices
from alignfed.simulation.recordings import RecordedConditions, RecordedDevice, Steps
from alignfed.simulation.trace import read_trace, record_trace
from alignfed.simulation.traces import livelab_devices, pensieve_conditions
from tests.shared import shared
from tests.simulation.fleets import make_fleet

MOMENTS = st.lists(st.floats(0.0, 1.0, exclude_max=True), max_size=6, unique=True).map(sorted)
PERIODS = st.sampled_from([1.0, 1.1, 0.7 / 0.6, 3.3])


def announced(conditions, device_id, until_s):
    time_s = 0.0
    while (time_s := conditions.next_change_s(device_id, time_s)) < until_s:
        yield time_s


def replayed(tmp_path, fleet, horizon_s):
    path = tmp_path / "trace.jsonl"
    path.write_text(record_trace(fleet, horizon_s), encoding="utf-8")
    return read_trace(path)


def assert_same_times(fleet, again, starts, cost, horizon_s):
    compared = 0
    for device_id in range(len(fleet)):
        for start_s in starts:
            original = fleet.task_times(device_id, start_s, cost)
            if original.finished_s < horizon_s:
                assert again.task_times(device_id, start_s, cost) == original
                compared += 1
    assert compared > 0


@given(MOMENTS, PERIODS, st.booleans())
def test_every_announced_change_is_a_change_however_often_a_recording_repeats(
    changes, period_s, begins
):
    conditions = RecordedConditions(
        [RecordedDevice(changes_s=changes, begins_available=begins)], period_s
    )
    times = [0.0, *announced(conditions, 0, 300 * period_s)]
    states = [conditions.available(0, time_s) for time_s in times]
    assert all(earlier != later for earlier, later in pairwise(states))
    for earlier, later in pairwise(times):
        assert conditions.available(0, math.nextafter(later, 0.0)) == conditions.available(
            0, earlier
        )


@given(MOMENTS.filter(lambda moments: len(moments) > 0), PERIODS, st.integers(0, 400))
def test_what_comes_next_comes_after_now_at_every_border(moments, period_s, repeat):
    device = RecordedDevice(
        compute=Steps([0.0, *[m for m in moments if m > 0]], [1.0, *[2.0 for m in moments if m]]),
        changes_s=moments,
        failures_s=moments,
    )
    conditions = RecordedConditions([device], period_s)
    for border in (repeat * period_s, *(repeat * period_s + moment for moment in moments)):
        for time_s in (math.nextafter(border, 0.0), border, math.nextafter(border, math.inf)):
            assert conditions.next_step_s(0, time_s) > time_s
            assert conditions.next_change_s(0, time_s) > time_s
            assert conditions.next_failure_s(0, time_s) > time_s
            assert conditions.compute_factor(0, time_s) in (1.0, 2.0)


def test_devices_with_periods_of_their_own_begin_again_each_at_its_own_time():
    steps = Steps([0.0, 1.0], [1.0, 5.0])
    conditions = RecordedConditions(
        [RecordedDevice(network=steps, period_s=2.0), RecordedDevice(network=steps, period_s=3.0)],
        math.inf,
    )
    assert [conditions.network_factor(0, t) for t in (0.5, 1.5, 2.5, 3.5)] == [1.0, 5.0, 1.0, 5.0]
    assert [conditions.network_factor(1, t) for t in (0.5, 1.5, 2.5, 3.5)] == [1.0, 5.0, 5.0, 1.0]


def test_a_recording_without_length_is_refused():
    with pytest.raises(FleetError, match=r"0\.0 s long"):
        RecordedConditions([RecordedDevice()], 0.0)
    with pytest.raises(FleetError, match=r"0\.0 s long"):
        RecordedConditions([RecordedDevice(period_s=0.0)], 10.0)


def test_steps_of_equal_factors_do_not_change_a_replayed_tasks_times(tmp_path):
    every = [0.1 * i for i in range(300)]
    device = RecordedDevice(network=Steps(every, [3.7 if i % 60 else 0.9 for i in range(300)]))
    fleet = make_fleet([1e9])
    fleet = Fleet(fleet.devices, RecordedConditions([device], 30.0))
    again = replayed(tmp_path, fleet, 95.0)
    starts = [0.37 * i for i in range(240)]
    assert_same_times(fleet, again, starts, TaskCost(1, 1.0, 1300, 2100), 95.0)


def test_real_bandwidth_recorded_over_its_repeats_replays_to_the_bit(tmp_path):
    path = shared("data", "bandwidth_pensieve", "bandwidth_mbps.csv.gz")
    fleet = Fleet(*pensieve_conditions(path, preset_devices("mixed", 12, 3), 3))
    again = replayed(tmp_path, fleet, 4000.0)
    starts = [40.7 * i for i in range(95)]
    assert_same_times(fleet, again, starts, TaskCost(1000, 1e6, 10**7, 10**7), 4000.0)


def test_real_availability_recorded_over_two_repeats_replays_to_the_bit(tmp_path):
    path = shared("data", "livelab_carat_6dev", "clients_preview.json")
    fleet = Fleet(*livelab_devices(path, 12, seed=1))
    again = replayed(tmp_path, fleet, 400_000.0)
    for device_id in range(12):
        times = list(announced(fleet.conditions, device_id, 400_000.0))
        assert times == list(announced(again.conditions, device_id, 400_000.0))
        for time_s in (0.0, *times):
            assert again.conditions.available(device_id, time_s) == fleet.conditions.available(
                device_id, time_s
            )
    starts = [1000.0 * i for i in range(395)]
    assert_same_times(fleet, again, starts, TaskCost(1000, 1e8, 10**7, 10**7), 400_000.0)


def test_real_bandwidth_goes_back_to_its_first_sample_after_its_last(tmp_path):
    path = tmp_path / "bandwidth.csv"
    path.write_text("trace_id,t_s,mbps\na,0,8\na,1,4\na,3,2\nb,0,8\nb,1,8\n")
    devices, conditions = pensieve_conditions(path, preset_devices("phones", 30, 1), seed=1)
    mean_of_a = (8 + 4 + 2) / 3
    on_a = [d.device_id for d in devices if d.down_bytes_per_s < 1e6]
    assert 0 < len(on_a) < 30
    for device_id in on_a:  # the last of its samples lasts 2 s, as the one before it: 5 s in all
        factors = [conditions.network_factor(device_id, t) for t in (0.5, 2.0, 4.5, 5.5, 7.0, 9.5)]
        rates = [mean_of_a / factor for factor in factors]
        assert rates == pytest.approx([8, 4, 2, 8, 4, 2])


def test_draws_stay_strictly_between_0_and_1_at_the_ends_of_the_hash(monkeypatch):
    for end in (0, 2**64 - 1):
        monkeypatch.setattr("alignfed.simulation.draws._mix", lambda value, end=end: end)
        assert 0.0 < uniform(1, 2, 3) < 1.0
        assert math.isfinite(normal(1, 2, 3))

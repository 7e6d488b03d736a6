import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfed.errors import FleetError, TraceError
from alignfed.simulation.conditions import GeneratedConditions, Variation
from alignfed.simulation.cost import (
    MemoryNeed,
    ServerProfile,
    TaskCost,
    TrainingShape,
    refuse_too_small,
    training_memory,
)
from alignfed.simulation.devices import Device, DeviceTable
from alignfed.simulation.presets import KINDS, PRESETS, preset_devices, spread_devices
from alignfed.simulation.trace import read_trace, record_trace
from tests.simulation.fleets import make_fleet

COST = TaskCost(tokens=100, flops_per_token=10.0, download_bytes=500, upload_bytes=2000)
VARIATIONS = st.fixed_dictionaries(
    {
        "slot_s": st.floats(0.3, 50.0),
        "compute_sigma": st.sampled_from([0.0, 0.5]),
        "network_sigma": st.sampled_from([0.0, 0.3]),
        "mean_on_s": st.sampled_from([math.inf, 20.0]),
        "mean_off_s": st.sampled_from([5.0, 40.0]),
        "failures_per_hour": st.sampled_from([0.0, 30.0]),
    }
)


def test_a_task_takes_tokens_times_flops_over_speed_plus_bytes_over_bandwidth():
    times = make_fleet([50.0]).task_times(0, 7.0, COST)
    assert times.downloaded_s == pytest.approx(7.5)
    assert times.computed_s == pytest.approx(27.5)
    assert times.finished_s == pytest.approx(29.5)
    assert times.lost_at_s is None


@given(VARIATIONS, st.floats(0, 1e4), st.integers(0, 3))
def test_phases_follow_each_other_and_losses_come_before_the_end(variation, start_s, device_id):
    times = make_fleet([50.0, 5.0, 80.0, 1.0], **variation).task_times(device_id, start_s, COST)
    assert start_s <= times.downloaded_s <= times.computed_s <= times.finished_s < math.inf
    if times.lost_at_s is not None:
        assert start_s <= times.lost_at_s < times.finished_s
        assert times.lost_reason in ("unavailable", "failure")


@given(VARIATIONS, st.floats(0, 1e3))
def test_more_tokens_more_bytes_and_less_speed_never_make_a_task_shorter(variation, start_s):
    slow, fast = make_fleet([10.0], **variation), make_fleet([20.0], **variation)
    larger = TaskCost(200, 10.0, 900, 3000)
    finished = fast.task_times(0, start_s, COST).finished_s
    assert finished <= fast.task_times(0, start_s, larger).finished_s + 1e-9
    assert finished <= slow.task_times(0, start_s, COST).finished_s + 1e-9


def test_compute_time_stretches_through_every_slot_it_lasts():
    fleet = make_fleet([1.0], slot_s=10.0, compute_sigma=1.0)
    factors = [fleet.conditions.compute_factor(0, 10.0 * slot) for slot in range(200)]
    cost = TaskCost(100, 1.0, 0, 0)
    done, slot = 0.0, 0
    while done + 10.0 / factors[slot] < 100.0:
        done += 10.0 / factors[slot]
        slot += 1
    expected = slot * 10.0 + (100.0 - done) * factors[slot]
    assert fleet.task_times(0, 0.0, cost).finished_s == pytest.approx(expected)


@given(VARIATIONS, st.integers(0, 2**40))
def test_adding_devices_and_asking_in_another_order_shifts_nobodys_draws(variation, seed):
    def look(conditions, device_id, times):
        return [
            (
                conditions.compute_factor(device_id, t),
                conditions.network_factor(device_id, t),
                conditions.available(device_id, t),
                conditions.next_change_s(device_id, t),
                conditions.next_failure_s(device_id, t),
            )
            for t in times
        ]

    times = [0.0, 3.0, 90.0, 1000.0]
    alone = GeneratedConditions(seed, Variation(**variation))
    together = GeneratedConditions(seed, Variation(**variation))
    for device_id in (5, 0, 9):
        look(together, device_id, times)
    assert look(alone, 3, times) == look(together, 3, times[::-1])[::-1]


@given(VARIATIONS)
def test_availability_flips_exactly_when_announced(variation):
    conditions = GeneratedConditions(1, Variation(**variation))
    time_s = 0.0
    for _ in range(6):
        change_s = conditions.next_change_s(2, time_s)
        if change_s == math.inf:
            assert conditions.available(2, 1e9)
            return
        before = math.nextafter(change_s, 0.0)
        assert conditions.available(2, before) != conditions.available(2, change_s)
        time_s = change_s


@settings(deadline=None)
@given(VARIATIONS, st.lists(st.tuples(st.integers(0, 2), st.floats(0, 300.0)), max_size=20))
def test_a_replayed_trace_gives_the_recorded_fleets_very_times(tmp_path_factory, variation, starts):
    fleet = make_fleet([50.0, 5.0, 80.0], seed=4, **variation)
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    path.write_text(record_trace(fleet, 5000.0), encoding="utf-8")
    again = read_trace(path)
    for device_id, start_s in starts:
        original = fleet.task_times(device_id, start_s, COST)
        if original.finished_s < 5000.0:
            assert again.task_times(device_id, start_s, COST) == original
        assert again.conditions.available(device_id, start_s) == fleet.conditions.available(
            device_id, start_s
        )


def test_past_its_horizon_a_trace_begins_again(tmp_path):
    fleet = make_fleet([5.0], compute_sigma=0.5, slot_s=7.0, mean_on_s=30.0, mean_off_s=9.0)
    path = tmp_path / "trace.jsonl"
    path.write_text(record_trace(fleet, 100.0), encoding="utf-8")
    again = read_trace(path).conditions
    for time_s in (0.0, 12.5, 55.0, 99.0):
        assert again.compute_factor(0, 200.0 + time_s) == again.compute_factor(0, time_s)
        assert again.available(0, 300.0 + time_s) == again.available(0, time_s)
    time_s = 0.0
    for _ in range(50):  # time always moves on
        following = again.next_change_s(0, time_s)
        assert following > time_s
        time_s = following


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: "", "empty"),
        (lambda text: "{}\n", "not a device trace"),
        (lambda text: text.replace('"version":1', '"version":9'), "version 9"),
        (lambda text: text.splitlines()[0], "holds 0"),
        (lambda text: text.replace('"horizon_s":60.0', '"horizon_s":-1'), "horizon_s is -1"),
        (lambda text: text.replace('"tier"', '"teir"'), "lacks 'tier'"),
        (lambda text: text.replace('"flops_per_s":5.0', '"flops_per_s":0'), "flops_per_s"),
        (lambda text: text.replace('"steps":[[0.0', '"steps":[[1.0'), "begin at time 0"),
        (lambda text: text.replace('"failures_s":[]', '"failures_s":[2,1]'), "must increase"),
        (lambda text: text.replace("\n{", "\n<"), "line 2 is not JSON"),
    ],
)
def test_a_damaged_trace_is_refused_by_file_line_and_value(tmp_path, spoil, words):
    path = tmp_path / "trace.jsonl"
    path.write_text(spoil(record_trace(make_fleet([5.0]), 60.0)), encoding="utf-8")
    with pytest.raises(TraceError, match=words):
        read_trace(path)


def test_a_device_that_is_too_small_is_refused_with_its_numbers():
    need = MemoryNeed(2 * 1024**3, 1024**3, 0, 0)
    devices = DeviceTable([Device(0, "phone", 1.0, 1.0, 2 * 1024**3, 1.0, 1.0)])
    with pytest.raises(FleetError, match=r"phone\) has 2 GiB, 3 GiB are needed") as caught:
        refuse_too_small(devices, need)
    assert caught.value.needed_bytes == 3 * 1024**3
    assert caught.value.too_small == (0,)
    refuse_too_small(devices, MemoryNeed(1024**3, 0, 0, 0))


def test_memory_grows_with_what_is_trained_and_checkpointing_saves():
    shape = dict(
        weight_bytes=1000,
        adapter_parameters=10,
        batch_size=4,
        sequence_length=16,
        hidden_size=8,
        intermediate_size=16,
        num_layers=6,
        num_heads=2,
        vocab_size=32,
    )
    plain = training_memory(TrainingShape(**shape))
    assert plain.adapter_bytes == 160
    assert plain.logits_bytes == 4 * 16 * 32 * 8
    saved = training_memory(TrainingShape(**shape, gradient_checkpointing=True))
    assert saved.activation_bytes < plain.activation_bytes
    longer = training_memory(TrainingShape(**{**shape, "sequence_length": 32}))
    assert longer.activation_bytes == 2 * plain.activation_bytes


def test_the_servers_time_comes_from_sizes():
    server = ServerProfile(memory_bytes_per_s=100.0, flops_per_s=10.0)
    assert server.server_time_s(50, 20) == pytest.approx(2.5)
    with pytest.raises(FleetError):
        ServerProfile(memory_bytes_per_s=0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_shares_add_up_and_show_in_its_devices(name):
    shares = PRESETS[name].shares
    assert sum(shares.values()) == pytest.approx(1.0)
    assert set(shares) <= set(KINDS)
    devices = preset_devices(name, 100, seed=3)
    for tier, share in shares.items():
        count = sum(device.tier == tier for device in devices)
        assert count == pytest.approx(100 * share, abs=3)
    few = preset_devices(name, 10, seed=3)
    assert [device.tier for device in few] == [device.tier for device in devices][:10]


def test_the_built_in_fleet_differs_a_hundredfold():
    assert PRESETS["mixed"].spread > 100


def test_spreads_keep_their_reference():
    speeds = sorted(d.flops_per_s for d in spread_devices("lognormal", 1.2, 501, seed=1))
    reference = KINDS["phone-mid"].device.flops_per_s
    assert speeds[250] == pytest.approx(reference, rel=0.25)
    slow = spread_devices("pareto", 1.5, 200, seed=1)
    assert max(d.flops_per_s for d in slow) <= reference
    for wrong in (("normal", 1.0), ("lognormal", 0.0), ("pareto", math.nan)):
        with pytest.raises(FleetError):
            spread_devices(*wrong, 3, seed=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"slot_s": 0.0},
        {"compute_sigma": -1.0},
        {"mean_off_s": -1.0},
        {"failures_per_hour": math.inf},
    ],
)
def test_variations_without_a_meaning_are_refused(wrong):
    with pytest.raises(FleetError):
        Variation(**wrong)


def test_an_idle_device_costs_little_memory():
    devices = spread_devices("lognormal", 1.0, 1000, seed=1)
    columns = [value for value in vars(devices).values() if hasattr(value, "nbytes")]
    total = sum(c.nbytes for c in columns) + sum(c.nbytes for c in devices._columns.values())
    assert total / len(devices) < 200

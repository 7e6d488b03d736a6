"""Claims about the mean of the last versions: when AlignFed takes it in their place."""

import math

import pytest
import torch

from alignfed.core.adapter import Adapter
from alignfed.core.aggregation.alignfed_state import AlignFedState
from alignfed.core.aggregation.path import LEAST_VERSIONS, in_valley, lead_on, swings
from alignfed.core.aggregation.trust import Trusted, trusted_step
from alignfed.core.lora import make_lora_rule
from alignfed.core.ports import Flush
from tests.contract.flushes import DistanceCalibrator
from tests.core.adapters import along, make_adapter

torch.set_num_threads(1)

BASE = make_adapter(1)
LORA = make_lora_rule("factor")
FRESH = AlignFedState()
VALLEY = DistanceCalibrator(BASE)


def at(place: float) -> Adapter:
    return along(BASE, 0, place)


def place_of(adapter: Adapter) -> float:
    moved = adapter.dense["score.weight"] - BASE.dense["score.weight"]
    return float(moved.view(-1)[0])


def walk(
    places: list[float], state: AlignFedState = FRESH, averaging: bool = True, window: int = 8
) -> list[Trusted]:
    """Take steps to these places, which no guard shortens, until a mean is taken."""
    current, taken = at(places[0]), []
    for version, place in enumerate(places[1:]):
        found = trusted_step(
            state,
            Flush(version, current, (), 1.0, 1, LORA, VALLEY),
            VALLEY,
            lambda scale, place=place: at(place),
            tolerance=1e6,
            margin=0.02,
            window=window,
            max_backtracks=0,
            averaging=averaging,
        )
        state, current = found.state, found.step.adapter
        taken.append(found)
        if found.notes["averaged"]:
            break
    return taken


def test_versions_on_both_sides_of_a_valley_are_replaced_by_their_mean():
    *before, last = walk([2.0, -1.0, 1.0, -2.1])
    assert [found.notes["averaged"] for found in before] == [0.0, 0.0]
    assert last.notes["averaged"] == 1.0
    assert place_of(last.step.adapter) == pytest.approx((2.0 - 1.0 + 1.0 - 2.1) / 4, abs=1e-6)
    own = VALLEY.loss(last.step.adapter)
    assert last.step.loss == last.state.calibration_loss == last.state.valley == own
    assert last.state.path is None


def test_switched_off_no_mean_is_measured_or_taken():
    taken = walk([2.0, -1.0, 1.0, -2.1], averaging=False)
    assert [place_of(found.step.adapter) for found in taken] == pytest.approx([-1.0, 1.0, -2.1])
    assert [found.forwards for found in taken] == [2, 1, 1]


def test_after_a_mean_the_next_step_begins_at_half_its_length():
    slow = AlignFedState(staleness=(1000,) * 64)  # where steps grow by next to nothing
    assert walk([2.0, -1.0, 1.0, -2.1], slow)[-1].state.trust == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "places",
    [
        [9.0, 7.0, 6.0, 4.0, 3.0, 1.0],  # down
        [1.0, 2.0, 4.0, 5.0, 7.0, 9.0],  # up
        [1.0, 3.0, 5.0, 6.0, 4.0, 2.0],  # over a hill
        [4.0, 5.0, 4.0, 5.0, 4.0, 5.0],  # to and fro on one side
    ],
)
def test_before_a_first_valley_a_path_around_none_is_left_alone(places):
    taken = walk(places)
    assert [place_of(found.step.adapter) for found in taken] == pytest.approx(places[1:], abs=1e-5)
    assert all(found.state.ceiling == 1.0 for found in taken)


def test_after_a_first_valley_a_path_that_leaves_its_best_version_behind_is_turned_back():
    up = [1.0, 2.0, 4.0, 5.0, 7.0, 9.0]
    taken = walk(up, AlignFedState(valley=math.inf, path=None))
    assert len(taken) == 5  # infinity is not a valley's loss
    taken = walk(up, AlignFedState(valley=0.5))
    assert [found.notes["averaged"] for found in taken] == [0.0, 0.0, 0.0, 1.0]
    assert place_of(taken[-1].step.adapter) == pytest.approx((1 + 2 + 4 + 5 + 7) / 5, abs=1e-5)


def test_a_valley_is_below_every_version_or_clearly_below_an_end_long_past_its_best():
    assert in_valley(0.9, [1.0, 2.0, 3.0, 2.0], margin=math.inf)
    assert not in_valley(1.1, [1.0, 2.0, 3.0, 2.0], margin=0.02)  # three past the best
    assert in_valley(1.1, [1.0, 2.0, 3.0, 2.0, 2.0], margin=0.02)
    assert not in_valley(1.97, [1.0, 2.0, 3.0, 2.0, 2.0], margin=0.02)
    assert not in_valley(2.0, [2.0, 2.0, 2.0, 2.0, 2.1], margin=0.02)  # one past its best


def test_a_mean_is_measured_only_while_the_last_version_is_not_the_best():
    down, up = walk([9.0, 7.0, 6.0, 4.0, 3.0]), walk([1.0, 2.0, 4.0, 5.0, 7.0])
    assert [found.forwards for found in down] == [2, 1, 1, 1]
    assert [found.forwards for found in up] == [2, 1, 2, 2]


def test_a_valley_no_lower_than_the_last_brings_the_ceiling_down_and_a_lower_one_up():
    around = [2.0, -1.0, 1.0, -2.1]
    flat = walk(around)[-1].state
    assert flat.ceiling == 0.5  # the first: nothing says yet that long steps lead further
    for valley, ceiling in ((math.inf, 1.0), (flat.valley, 0.25)):
        state = AlignFedState(ceiling=0.5, valley=valley, scales=(1.0,) * 8)
        assert walk(around, state)[-1].state.ceiling == ceiling


def test_a_long_path_forgets_where_it_began():
    path = None
    for _ in range(40):
        path = lead_on(path, at(5.0), at(1.0), LORA, window=6)
    assert path is not None and path.versions == 6
    assert place_of(path.mean) == pytest.approx(1.0, abs=0.02)


def test_a_guard_that_looks_back_one_flush_still_sees_a_valley():
    taken = walk([2.0, -1.0, 1.0, -2.1], window=1)
    assert taken[-1].notes["averaged"] == 1.0


def test_few_versions_tell_nothing():
    assert LEAST_VERSIONS == 4
    assert not swings([3.0, 1.0, 2.0]) and swings([3.0, 1.0, 2.0, 2.0])
    assert not swings([3.0, 2.0, 2.0, 1.0]) and not swings([2.0, 2.0, 2.0, 2.0])

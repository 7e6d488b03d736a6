"""Where local steps follow from speed, a new device is asked for its own before it joins."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignfed.core.local_steps import StepsBySpeed
from alignfed.core.state import check_invariants
from alignfed.flower.messages import CollectOrder, Failure, Order, TaskOrder, Uploads
from tests.flower.grids import FakeDevice, ScriptedGrid
from tests.flower.servers import Server, make_coordinator, serve


def by_speed(uploads: int = 9, concurrency: int = 3):  # type: ignore[no-untyped-def]
    return make_coordinator(
        uploads=uploads, concurrency=concurrency, local_steps=StepsBySpeed(6, spread=3.0)
    )


def steps_given(server: Server) -> dict[int, set[int | None]]:
    return {
        node: {order.steps for order in device.orders if isinstance(order, TaskOrder)}
        for node, device in server.devices.items()
    }


def test_devices_get_steps_by_the_speed_they_say_they_have(tmp_path: Path) -> None:
    devices = {100 + i: FakeDevice(step_s=step_s) for i, step_s in enumerate([1.0, 2.0, 0.1])}
    server = serve(tmp_path, devices, by_speed())
    server.run()
    assert server.driver.state.speeds.step_s == {0: 1.0, 1: 2.0, 2: 0.1}
    assert all(isinstance(device.orders[0], CollectOrder) for device in devices.values())
    # The first to answer is the middle of one, and the second of two; then all three are known.
    assert steps_given(server) == {100: {6}, 101: {6, 3}, 102: {18}}
    check_invariants(server.driver.state, server.driver.parts.coordinator.settings)


def test_a_device_that_does_not_know_its_speed_takes_the_usual_steps(tmp_path: Path) -> None:
    server = serve(tmp_path, 2, by_speed(concurrency=2))
    server.run()
    assert steps_given(server) == {100: {6}, 101: {6}}


def test_nobody_is_greeted_where_all_take_the_same_steps(tmp_path: Path) -> None:
    server = serve(tmp_path, 2, make_coordinator(uploads=4, concurrency=2))
    server.run()
    assert all(isinstance(device.orders[0], TaskOrder) for device in server.devices.values())


@pytest.mark.parametrize("after_s", [1.9, 9.0, 26.0])
def test_a_killed_server_knows_again_what_devices_said_of_their_speed(
    tmp_path: Path, after_s: float
) -> None:
    devices = {100 + i: FakeDevice(step_s=step_s) for i, step_s in enumerate([1.0, 2.0, 0.1])}
    first = serve(tmp_path, devices, by_speed())
    first.run_for(after_s)
    known = dict(first.driver.state.speeds.step_s)
    assert len(known) == 3
    first.kill()
    grid = ScriptedGrid(first.clock, devices)
    second = serve(tmp_path, devices, by_speed(), clock=first.clock, grid=grid)
    assert second.driver.state.speeds.step_s == known
    second.run()
    assert second.driver.state.accepted == 9
    assert steps_given(second) == {100: {6}, 101: {6, 3}, 102: {18}}


def test_who_leaves_before_it_has_answered_joins_when_it_comes_back(tmp_path: Path) -> None:
    devices = {100: FakeDevice(step_s=1.0), 101: FakeDevice(step_s=1.0)}
    server = serve(tmp_path, devices, by_speed(uploads=100, concurrency=2))
    devices[101].answer = lambda device, order: None
    server.clock.at.append((1001.0, lambda: server.grid.online.discard(101)))

    def come_back() -> None:
        devices[101].answer = None
        server.grid.online.add(101)

    server.clock.at.append((1020.0, come_back))
    server.run_for(15.0)
    assert set(server.driver.state.clients) == {0}
    server.run()
    assert set(server.driver.state.clients) == {0, 1}
    assert devices[101].trained


@pytest.mark.parametrize("wrong", ["another run", "a failure"])
def test_a_wrong_answer_to_the_greeting_is_asked_for_again(tmp_path: Path, wrong: str) -> None:
    answers: list[Order] = []

    def answer(device: FakeDevice, order: Order) -> object:
        answers.append(order)
        if len(answers) < 3:
            if wrong == "another run":
                return Uploads("another", {}, 1.0)
            return Failure(order.run, 0, "no")
        return FakeDevice.honest(device, order)

    devices = {100: FakeDevice(step_s=1.0), 101: FakeDevice(answer=answer, step_s=0.5)}
    server = serve(tmp_path, devices, by_speed(uploads=12, concurrency=2))
    server.run()
    assert set(server.driver.state.clients) == {0, 1}
    assert steps_given(server)[101] == {12}

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from flwr.app import Error, RecordDict

from alignfed.core.events import UpdateArrived, UploadRefused
from alignfed.core.reasons import RejectReason
from alignfed.core.state import check_invariants
from alignfed.flower import messages, wire
from alignfed.flower.driver import DriverSettings
from alignfed.flower.messages import CollectOrder, Failure, Order, StopOrder, TaskOrder, Uploads
from alignfed.flower.orders import Patience
from alignfed.flower.pace import PaceSettings
from alignfed.journal import RunReader
from tests.flower.grids import FakeDevice, ScriptedGrid, nan_like
from tests.flower.servers import Server, make_coordinator, serve


def outcomes(reader: RunReader) -> Counter[str]:
    with reader:
        return Counter(upload.outcome for upload in reader.uploads())


def reasons(reader: RunReader) -> dict[str, int]:
    with reader:
        return dict(reader.rejections())


def undeliverable(device: FakeDevice, order: Order) -> object:
    """Answer for a device that does the task and cannot deliver its upload."""
    FakeDevice.honest(device, order)
    return Error(code=5, reason="node gone")


def task_orders(server: Server) -> list[tuple[int, TaskOrder]]:
    return [(node, order) for node, order in server.grid.pushed if isinstance(order, TaskOrder)]


def test_a_run_applies_every_upload_and_stops(tmp_path: Path) -> None:
    server = serve(tmp_path, 3, make_coordinator(uploads=9, concurrency=3))
    reader = server.run()
    assert outcomes(reader)["applied"] == 9
    check_invariants(server.driver.state, server.driver.parts.coordinator.settings)
    assert server.driver.status.loss is not None
    assert server.driver.status.received_bytes > server.driver.status.sent_bytes / 10 > 0


def test_a_device_works_on_one_task_at_a_time(tmp_path: Path) -> None:
    server = serve(tmp_path, 2, make_coordinator(uploads=8, concurrency=8))
    server.run()
    for device in server.devices.values():
        ids = [order.task_id for order in device.orders if isinstance(order, TaskOrder)]
        assert ids == sorted(set(ids)) == device.trained


def test_uploads_are_acknowledged_only_once_they_are_on_disk(tmp_path: Path) -> None:
    server = serve(tmp_path, 2, make_coordinator(uploads=6, concurrency=2))
    on_disk: set[int] = set()
    sync, record = server.log.sync, server.log.record
    waiting: list[int] = []

    def watched_record(event, instructions):  # type: ignore[no-untyped-def]
        record(event, instructions)
        if isinstance(event, UpdateArrived | UploadRefused):
            waiting.append(getattr(event, "update", event).task_id)

    def watched_sync() -> None:
        sync()
        on_disk.update(waiting)

    server.log.record, server.log.sync = watched_record, watched_sync  # type: ignore[method-assign]
    push = server.grid.push_messages

    def watched_push(sent):  # type: ignore[no-untyped-def]
        sent = list(sent)
        for message in sent:
            assert set(messages.read_order(message.content).acknowledged) <= on_disk
        return push(sent)

    server.grid.push_messages = watched_push  # type: ignore[method-assign]
    server.run()
    assert on_disk >= set(range(5))
    assert all(not device.outbox for device in server.devices.values())


def test_every_device_hears_the_end_and_empties_its_outbox(tmp_path: Path) -> None:
    server = serve(tmp_path, 3, make_coordinator(uploads=7, concurrency=3))
    server.run()
    for device in server.devices.values():
        assert isinstance(device.orders[-1], StopOrder)


def test_what_arrives_after_the_end_is_refused_and_recorded(tmp_path: Path) -> None:
    server = serve(tmp_path, 3, make_coordinator(uploads=4, concurrency=3, buffer_size=4))
    reader = server.run()
    assert reasons(reader) == {"run_stopped": 2}


@pytest.mark.parametrize("returns_after_s", [15.0, 500.0])
def test_who_is_away_with_a_finished_task_when_the_run_ends_is_waited_for_and_recorded(
    tmp_path: Path, returns_after_s: float
) -> None:
    settings = DriverSettings(start_clients=2, closing_s=30.0)
    server = serve(
        tmp_path, 2, make_coordinator(uploads=4, concurrency=2, buffer_size=4), settings=settings
    )

    away = server.devices[100]
    away.answer = undeliverable  # type: ignore[assignment]

    def come_back() -> None:
        away.answer = None
        server.grid.online.add(100)

    server.clock.at.append((1002.0, lambda: server.grid.online.discard(100)))
    server.run_for(30.0)
    assert server.driver.state.stopped is not None
    (finished,) = away.outbox
    server.clock.at.append((server.clock.now_s + returns_after_s, come_back))
    with server.run() as reader:
        fate = {one.task_id: one.reason for one in reader.uploads()}
        given_up = {row.task_id: row.body["reason"] for row in reader.rows(name="TaskFailed")}
    if returns_after_s < settings.closing_s:
        assert fate[finished] == "run_stopped" and not away.outbox
        assert finished not in given_up
    else:
        assert "the run ended, and its device had been away" in given_up[finished]


@pytest.mark.parametrize(
    "says, words", [("nothing", "had not answered"), ("no upload", "had nothing to hand in for it")]
)
def test_a_task_that_a_device_here_leaves_open_at_the_end_is_recorded_as_what_it_is(
    tmp_path: Path, says: str, words: str
) -> None:
    settings = DriverSettings(
        start_clients=2, closing_s=60.0, patience=Patience(backoff_s=20.0, away_s=1e6)
    )
    server = serve(
        tmp_path, 2, make_coordinator(uploads=4, concurrency=2, buffer_size=4), settings=settings
    )

    def answer(device: FakeDevice, order: Order) -> object:
        if isinstance(order, TaskOrder):  # lost on the way: the server means to send it again
            return None if says == "nothing" else Error(code=5, reason="node gone")
        return Uploads(order.run, {})

    server.devices[100].answer = answer  # type: ignore[assignment]
    with server.run() as reader:
        (row,) = reader.rows(name="TaskFailed")
    assert row.client_id == 0
    assert row.body["reason"] == f"the run ended, and its device {words}"


def test_late_devices_get_no_message_while_they_are_offline(tmp_path: Path) -> None:
    server = serve(
        tmp_path, 3, make_coordinator(uploads=9, concurrency=3), settings=DriverSettings()
    )
    server.grid.online.discard(102)
    server.clock.at.append((1020.0, lambda: server.grid.online.add(102)))
    server.run()  # the grid itself asserts that nobody offline is written to
    assert server.devices[102].trained


def test_a_lost_task_is_sent_again_and_answered_without_training_again(tmp_path: Path) -> None:
    lost = []

    def crash_once(device: FakeDevice, order: Order) -> object:
        reply = FakeDevice.honest(device, order)
        if isinstance(order, TaskOrder) and not lost:
            lost.append(order.task_id)
            return Error(code=8, reason="killed")
        return reply

    server = serve(tmp_path, 2, make_coordinator(uploads=6, concurrency=2))
    server.devices[100].answer = crash_once  # type: ignore[assignment]
    reader = server.run()
    assert outcomes(reader)["applied"] == 6
    sent = [order.task_id for node, order in task_orders(server) if node == 100]
    assert sent.count(lost[0]) == 2
    assert server.devices[100].trained.count(lost[0]) == 1


def test_a_task_that_always_crashes_is_given_up_after_its_resends(tmp_path: Path) -> None:
    server = serve(
        tmp_path,
        2,
        make_coordinator(uploads=6, concurrency=2, retry_backoff_s=1000.0),
        settings=DriverSettings(start_clients=2, patience=Patience(resends=2)),
    )
    server.devices[100].answer = lambda device, order: Error(code=8, reason="killed")
    reader = server.run()
    assert outcomes(reader)["applied"] == 6
    assert len([1 for node, _ in task_orders(server) if node == 100]) == 3
    assert server.driver.status.clients[0].failures == 1


@pytest.mark.parametrize("code", [1, 2, 6, 7])
def test_an_app_that_raised_is_not_asked_for_the_same_task_again(tmp_path: Path, code: int) -> None:
    server = serve(tmp_path, 2, make_coordinator(uploads=6, concurrency=2, retry_backoff_s=1000.0))
    server.devices[100].answer = lambda device, order: Error(code=code, reason="ValueError")
    server.run()
    assert len([1 for node, _ in task_orders(server) if node == 100]) == 1
    assert f"Flower error {code}" in server.driver.status.clients[0].last_error


def test_a_device_that_keeps_failing_is_asked_less_and_less(tmp_path: Path) -> None:
    server = serve(tmp_path, 2, make_coordinator(uploads=60, concurrency=2))

    def give_up(device: FakeDevice, order: Order) -> object:
        if not isinstance(order, TaskOrder):
            return FakeDevice.honest(device, order)
        return Failure(order.run, order.task_id, "no disk")

    server.devices[100].answer = give_up  # type: ignore[assignment]
    server.run()
    tries = len([1 for node, _ in task_orders(server) if node == 100])
    assert 3 <= tries <= 10
    assert server.driver.status.clients[0].last_error == "no disk"


def test_a_silent_device_is_given_up_when_its_message_ends(tmp_path: Path) -> None:
    pace = PaceSettings(first_ttl_s=60.0, min_ttl_s=10.0)
    server = serve(
        tmp_path,
        2,
        make_coordinator(uploads=60, concurrency=2),
        settings=DriverSettings(start_clients=2, patience=Patience(resends=0), pace=pace),
    )
    server.devices[100].answer = lambda device, order: None
    reader = server.run()
    assert outcomes(reader)["applied"] == 60
    assert "no answer in 60 s" in server.driver.status.clients[0].last_error


def test_attempts_at_a_task_are_forgotten_with_it(tmp_path: Path) -> None:
    coordinator = make_coordinator(uploads=30, concurrency=2, task_timeout_s=8.0)
    settings = DriverSettings(start_clients=2, patience=Patience(backoff_s=20.0))
    server = serve(tmp_path, 2, coordinator, settings=settings)
    server.devices[100].answer = lambda device, order: Error(code=5, reason="node gone")
    server.run()
    assert len({order.task_id for node, order in task_orders(server) if node == 100}) > 1
    assert server.driver._orders._attempts.keys() <= server.driver.state.tasks.keys()


def test_a_restarted_node_is_sent_its_task_again_at_once(tmp_path: Path) -> None:
    server = serve(tmp_path, 2, make_coordinator(uploads=6, concurrency=2))
    server.devices[100].takes_s = 30.0
    server.clock.at.append((1010.0, lambda: server.grid.restart(100)))
    reader = server.run()
    assert outcomes(reader)["applied"] == 6
    first = [order.task_id for node, order in task_orders(server) if node == 100][:2]
    assert first[0] == first[1]
    assert server.devices[100].trained.count(first[0]) == 1


def test_an_absent_devices_task_waits_for_it_so_long_and_no_longer(tmp_path: Path) -> None:
    settings = DriverSettings(start_clients=2, patience=Patience(away_s=50.0))
    server = serve(tmp_path, 2, make_coordinator(uploads=40, concurrency=2), settings=settings)
    server.devices[100].answer = lambda device, order: Error(code=5, reason="node gone")
    server.devices[100].takes_s = 8.0

    def leave() -> None:
        server.grid.online.discard(100)

    server.clock.at.append((1002.0, leave))
    server.run()
    assert "away" in server.driver.status.clients[0].last_error


def test_an_upload_finished_while_away_comes_with_a_collection_and_is_not_lost(
    tmp_path: Path,
) -> None:
    """The device finishes, cannot deliver, is given up, and returns."""
    settings = DriverSettings(start_clients=2, patience=Patience(away_s=20.0))
    server = serve(
        tmp_path,
        2,
        make_coordinator(uploads=30, concurrency=1, retry_backoff_s=5.0),
        settings=settings,
    )

    device = server.devices[100]
    device.answer = undeliverable  # type: ignore[assignment]

    def leave() -> None:
        server.grid.online.discard(100)

    def come_back() -> None:
        device.answer = None
        server.grid.online.add(100)

    server.clock.at += [(1002.0, leave), (1060.0, come_back)]
    finished = []
    server.clock.at.append((1059.0, lambda: finished.extend(device.outbox)))
    reader = server.run()
    assert finished and not device.outbox
    with reader:
        fate = {upload.task_id: upload.reason for upload in reader.uploads()}
    assert fate[finished[0]] == "task_expired"
    assert any(isinstance(order, CollectOrder) for order in device.orders)


def test_time_to_live_follows_what_a_device_needs(tmp_path: Path) -> None:
    server = serve(tmp_path, 2, make_coordinator(uploads=8, concurrency=2))
    ttls: list[float] = []
    push = server.grid.push_messages

    def watched(sent):  # type: ignore[no-untyped-def]
        sent = list(sent)
        ttls.extend(message.metadata.ttl for message in sent)
        return push(sent)

    server.grid.push_messages = watched  # type: ignore[method-assign]
    server.run()
    assert ttls[0] == 3600.0 and ttls[-1] == 60.0  # 5 x 6 s is below the floor


# --- a server that dies ---------------------------------------------------------------------


@pytest.mark.parametrize("after_s", [0.5, 4.9, 5.3, 7.1, 16.0, 31.0])
def test_a_killed_server_goes_on_and_nothing_is_lost_or_applied_twice(
    tmp_path: Path, after_s: float
) -> None:
    settings = DriverSettings(start_clients=3, checkpoint_s=7.0)
    coordinator = make_coordinator(uploads=15, concurrency=3)
    first = serve(tmp_path, 3, coordinator, settings=settings)
    first.run_for(after_s)
    first.kill()
    # A new Flower run: old replies do not reach it, devices keep what was not acknowledged.
    grid = ScriptedGrid(first.clock, first.devices)
    coordinator = make_coordinator(uploads=15, concurrency=3)
    second = serve(
        tmp_path, first.devices, coordinator, clock=first.clock, grid=grid, settings=settings
    )
    reader = second.run()
    found = outcomes(reader)
    assert found["applied"] == 15
    with RunReader(tmp_path) as again:
        uploads = [upload.task_id for upload in again.uploads()]
    trained = Counter(task for device in first.devices.values() for task in device.trained)
    assert sorted(trained) == sorted(set(uploads)) and max(trained.values()) == 1
    assert Counter(uploads).most_common(1)[0][1] == 1
    assert all(not device.outbox for device in first.devices.values())


def test_a_restarted_server_takes_away_who_does_not_return(tmp_path: Path) -> None:
    coordinator = make_coordinator(uploads=12, concurrency=2)
    settings = DriverSettings(start_clients=3, patience=Patience(away_s=30.0))
    first = serve(tmp_path, 3, coordinator, settings=settings)
    first.run_for(7.0)
    first.log.close()
    grid = ScriptedGrid(first.clock, first.devices)
    grid.online.discard(100)
    second = serve(
        tmp_path,
        first.devices,
        make_coordinator(uploads=12, concurrency=2),
        clock=first.clock,
        grid=grid,
        settings=settings,
    )
    assert outcomes(second.run())["applied"] == 12


# --- hostile and broken devices ---------------------------------------------------------------


def _uploads(order: Order, payload: bytes) -> Uploads:
    assert isinstance(order, TaskOrder)
    return Uploads(order.run, {order.task_id: payload})


def _nan(device: FakeDevice, order: TaskOrder) -> Uploads:
    base = wire.decode_download(order.payload, max_bytes=1 << 30).adapter
    claims = wire.Claims(order.run, order.task_id, order.base_version, 8, "fp32", {})
    return _uploads(order, wire.encode_upload(claims, nan_like(base), base)[0])


def _foreign(device: FakeDevice, order: TaskOrder) -> Uploads:
    other = order.task_id + 1 if order.task_id == 0 else order.task_id - 1
    return Uploads(order.run, {other: device.train(order, task_id=other)})


HOSTILE = {
    "pickle": (
        lambda d, o: _uploads(o, b"\x80\x05\x95\x10\x00\x00\x00\x00\x00\x00\x00."),
        RejectReason.MALFORMED,
    ),
    "truncated": (lambda d, o: _uploads(o, d.train(o)[:-7]), RejectReason.MALFORMED),
    "empty": (lambda d, o: _uploads(o, b""), RejectReason.MALFORMED),
    "oversize": (lambda d, o: _uploads(o, d.train(o) + bytes(1 << 20)), RejectReason.TOO_LARGE),
    "damaged": (
        lambda d, o: _uploads(o, d.train(o)[:-1] + b"\x7f"),
        RejectReason.WRONG_CHECKSUM,
    ),
    "not a number": (_nan, RejectReason.NOT_FINITE),
    "future version": (
        lambda d, o: _uploads(o, d.train(o, base_version=999)),
        RejectReason.FUTURE_VERSION,
    ),
    "another task inside": (
        lambda d, o: _uploads(o, d.train(o, task_id=o.task_id + 1)),
        RejectReason.WRONG_TASK,
    ),
    "another run inside": (
        lambda d, o: _uploads(o, d.train(o, run="other")),
        RejectReason.WRONG_RUN,
    ),
    "another run": (lambda d, o: Uploads("other", {}), RejectReason.WRONG_RUN),
    "no examples": (
        lambda d, o: _uploads(o, d.train(o, num_examples=0)),
        RejectReason.NO_EXAMPLES,
    ),
    "unknown task": (lambda d, o: Uploads(o.run, {10**9: b"x"}), RejectReason.UNKNOWN_TASK),
    "someone else's task": (_foreign, RejectReason.WRONG_CLIENT),
    "no words": (lambda d, o: RecordDict(), RejectReason.MALFORMED),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_device_is_refused_with_a_reason_and_disturbs_nobody(
    tmp_path: Path, name: str
) -> None:
    attack, reason = HOSTILE[name]

    def answer(device: FakeDevice, order: Order) -> object:
        return attack(device, order) if isinstance(order, TaskOrder) else Uploads(order.run, {})

    coordinator = make_coordinator(uploads=14, concurrency=3)
    server = serve(tmp_path, 3, coordinator)
    server.devices[100].answer = answer  # type: ignore[assignment]
    server.devices[100].takes_s = 2.0
    reader = server.run()
    with reader:
        applied = [upload.client_id for upload in reader.uploads("applied")]
        found = dict(reader.rejections())
    assert applied and 0 not in applied
    assert found.get(reason, 0) >= 1
    assert set(applied) == {1, 2}
    buffers = server.driver.state.adapter.buffers
    assert all(torch.isfinite(buffer).all() for buffer in buffers.values())


def test_a_replayed_upload_is_refused_and_a_repeated_one_is_not_counted(tmp_path: Path) -> None:
    kept: dict[int, bytes] = {}

    def replay(device: FakeDevice, order: Order) -> object:
        reply = FakeDevice.honest(device, order)
        assert isinstance(reply, Uploads)
        kept.update(reply.payloads)
        return Uploads(order.run, dict(kept))

    server = serve(tmp_path, 2, make_coordinator(uploads=10, concurrency=2))
    server.devices[100].answer = replay  # type: ignore[assignment]
    reader = server.run()
    with reader:
        uploads = list(reader.uploads())
    applied = [upload.task_id for upload in uploads if upload.outcome == "applied"]
    assert len(applied) == len(set(applied)) == 10
    refused = {upload.reason for upload in uploads if upload.outcome == "rejected"}
    assert "task_used" in refused
    assert refused <= {"task_used", "run_stopped"}


def test_a_flood_of_uploads_is_turned_away_but_the_task_asked_for_is_taken(tmp_path: Path) -> None:
    def flood(device: FakeDevice, order: Order) -> object:
        reply = FakeDevice.honest(device, order)
        assert isinstance(reply, Uploads)
        return Uploads(order.run, {**reply.payloads, **{10**6 + i: b"x" for i in range(500)}})

    settings = DriverSettings(start_clients=2, pace=PaceSettings(uploads_per_minute=10.0))
    server = serve(tmp_path, 2, make_coordinator(uploads=10, concurrency=2), settings=settings)
    server.devices[100].answer = flood  # type: ignore[assignment]
    reader = server.run()
    with reader:
        found = dict(reader.rejections())
        applied = [upload.client_id for upload in reader.uploads("applied")]
    assert found["too_many"] >= 1 and found["unknown_task"] < 100
    assert 0 in applied


def test_a_revoked_node_is_refused_at_once(tmp_path: Path) -> None:
    server = serve(tmp_path, 3, make_coordinator(uploads=12, concurrency=3))
    server.clock.at.append((1002.0, lambda: server.members.revoked.add(100)))
    reader = server.run()
    with reader:
        applied = [upload.client_id for upload in reader.uploads("applied")]
        assert dict(reader.rejections())["unknown_client"] == 1
    assert 0 not in applied
    assert len([1 for node, _ in server.grid.pushed if node == 100]) == 1


def test_uploads_that_were_asked_for_are_taken_however_fast_they_come(tmp_path: Path) -> None:
    settings = DriverSettings(start_clients=1, pace=PaceSettings(uploads_per_minute=2.0))
    devices = {100: FakeDevice(takes_s=0.1)}
    server = serve(
        tmp_path, devices, make_coordinator(uploads=40, concurrency=1), settings=settings
    )
    assert reasons(server.run()) == {}

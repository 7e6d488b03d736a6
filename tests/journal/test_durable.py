"""A server killed anywhere goes on with everything it acknowledged, and its disk stays bounded."""

from __future__ import annotations

import math
import random
import shutil
import signal
import sqlite3
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from alignfed.core.events import ClientJoined, UploadRefused
from alignfed.core.instructions import Dispatch, Evaluate, RejectReason, SetTimer, Stop
from alignfed.errors import JournalError
from alignfed.journal import DurableLog, RunReader
from alignfed.journal.serving import MOST_OPEN_EVALUATIONS, ServerState
from tests.core.adapters import make_adapter
from tests.journal import serving
from tests.journal.serving import Server, fingerprint, make_coordinator
from tests.journal.test_kill import kill, processes, start

__all__ = ["processes"]


def serve(root: Path, steps: int, every: int = 5, **options: object) -> Server:
    server = Server.begin(root, make_coordinator(), **options)
    for number in range(1, steps + 1):
        server.step()
        if number % every == 0:
            server.checkpoint()
    return server


def uploads_on_disk(root: Path) -> list[Path]:
    """Files of uploads that no checkpoint refers to."""
    connection = sqlite3.connect(root / "journal.sqlite")
    rows = connection.execute("SELECT adapters, tensors FROM checkpoints").fetchall()
    connection.close()
    named = {name for adapters, tensors in rows for name in (adapters + " " + tensors).split()}
    return [path for path in (root / "checkpoints").iterdir() if path.stem not in named]


# --- recovery ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 5, 7, 12])
def test_a_recovered_server_is_where_it_was(tmp_path: Path, steps: int) -> None:
    server = serve(tmp_path, steps)
    wanted, open_tasks = fingerprint(server.state, make_coordinator()), set(server.state.tasks)
    rows = server.log._journal.digest()
    server.log.close()
    coordinator = make_coordinator()
    again = Server.restart(tmp_path, coordinator)
    assert fingerprint(again.state, coordinator) == wanted
    with RunReader(tmp_path) as reader:
        assert again.time_s == reader.last()[1] > 0
    assert again.log._journal.digest() == rows
    assert {i.task.task_id for i in again.to_do if isinstance(i, Dispatch)} == open_tasks
    for instruction in again.to_do:
        if isinstance(instruction, Dispatch):
            base = again.state.snapshots[instruction.task.base_version].adapter
            assert instruction.adapter is base
    again.log.close()


def test_recovery_asks_the_record_and_not_the_calibrator(tmp_path: Path) -> None:
    server = serve(tmp_path, 9, every=100)
    assert server.state.version > 3
    server.log.close()
    coordinator = make_coordinator()
    Server.restart(tmp_path, coordinator).log.close()
    assert coordinator.calibrator.asked == 0


def test_inputs_that_were_not_kept_are_asked_for_again(tmp_path: Path) -> None:
    settings = {"rule": "alignfed", "alignment_map": "activation"}
    server = Server.begin(tmp_path, make_coordinator(**settings))
    for _ in range(9):
        server.step()
    wanted = fingerprint(server.state, server.log.coordinator)
    server.log.close()
    coordinator = make_coordinator(**settings)
    again = Server.restart(tmp_path, coordinator)
    assert fingerprint(again.state, coordinator) == wanted
    assert coordinator.calibrator.asked > 0
    again.log.close()


def test_what_was_recorded_and_not_synced_is_lost_whole(tmp_path: Path) -> None:
    server = serve(tmp_path / "run", 6)
    state = fingerprint(server.state, make_coordinator())
    shutil.copytree(tmp_path / "run", tmp_path / "copy", ignore=shutil.ignore_patterns("run.lock"))
    server.step()  # never reaches the copy
    server.log.close()
    again = Server.restart(tmp_path / "copy", make_coordinator())
    assert fingerprint(again.state, make_coordinator()) == state
    again.log.close()


def test_evaluations_timers_and_the_end_are_still_open_after_a_restart(tmp_path: Path) -> None:
    coordinator = make_coordinator(uploads=6)
    server = Server.begin(tmp_path, coordinator)
    (first,) = [item for item in server.to_do if isinstance(item, Evaluate)]
    server.log.close()
    server = Server.restart(tmp_path, coordinator)
    (again,) = [item for item in server.to_do if isinstance(item, Evaluate)]
    assert (again.version, again.adapter.checksum) == (0, first.adapter.checksum)
    assert not any(isinstance(item, SetTimer) for item in server.to_do) or math.isfinite(
        server.state.wake_at_s
    )
    while server.step():
        pass
    server.log.close()
    server = Server.restart(tmp_path, coordinator)
    stops = [item for item in server.to_do if isinstance(item, Stop)]
    assert [stop.version for stop in stops] == [server.state.version]
    assert not any(isinstance(item, Dispatch) for item in server.to_do)
    server.log.close()


def test_a_driver_that_scores_nothing_does_not_grow_the_state() -> None:
    server = ServerState(make_coordinator().initial_state(make_adapter()))
    for version in range(50):
        server.note(object(), [Evaluate(version, make_adapter())])  # type: ignore[arg-type]
    assert list(server.unscored) == list(range(50 - MOST_OPEN_EVALUATIONS, 50))


def test_an_answered_task_is_known_before_and_after_it_is_on_disk(tmp_path: Path) -> None:
    server = serve(tmp_path, 5)
    task_id = server.acknowledged[-1]
    with RunReader(tmp_path) as reader:
        (client_id,) = [u.client_id for u in reader.uploads() if u.task_id == task_id]
    assert server.log.holds_upload(task_id, client_id)
    assert not server.log.holds_upload(task_id, client_id + 1)
    refused = UploadRefused(
        server.time_s, 7_777, 2, RejectReason.UNKNOWN_TASK, "bytes that are no upload"
    )
    server.state, instructions = server.log.coordinator.handle(server.state, refused)
    server.log.record(refused, instructions)
    assert server.log.holds_upload(7_777, 2)
    server.log.sync()
    assert server.log.holds_upload(7_777, 2)
    server.log.close()
    with RunReader(tmp_path) as reader:
        assert [u.reason for u in reader.uploads("rejected") if u.task_id == 7_777] == [
            "unknown_task"
        ]
    again = Server.restart(tmp_path, make_coordinator())
    assert again.log.holds_upload(7_777, 2)
    again.log.close()


def test_after_an_event_that_could_not_be_recorded_nothing_is_taken_until_recovery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(tmp_path, 5)
    received = server.state.received

    def full(*arguments: object) -> None:
        raise JournalError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("alignfed.journal.blobs.BlobStore.put_adapter", full)
        with pytest.raises(JournalError, match="No space left"):
            server.step()
    with pytest.raises(JournalError, match="could not be recorded; open it again and recover"):
        server.take([ClientJoined(server.time_s, 0)])
    with pytest.raises(JournalError, match="open it again"):
        server.checkpoint()
    server.log.close()
    again = Server.restart(tmp_path, make_coordinator())
    assert again.state.received == received
    again.log.close()


def test_a_wait_for_the_disk_that_failed_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(tmp_path, 5)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("alignfed.journal.blobs.sync", full)
        with pytest.raises(JournalError, match="No space left"):
            server.step()
    server.log.sync()
    wanted = fingerprint(server.state, make_coordinator())
    server.log.close()
    again = Server.restart(tmp_path, make_coordinator())
    assert fingerprint(again.state, make_coordinator()) == wanted
    again.log.close()


def test_nothing_is_taken_before_recovery(tmp_path: Path) -> None:
    server = serve(tmp_path, 2)
    state = server.state
    server.log.close()
    with DurableLog(tmp_path, make_coordinator()) as log:
        with pytest.raises(JournalError, match="was not recovered yet"):
            log.checkpoint(state)
        with pytest.raises(JournalError, match="another recipe"):
            log.recover(recipe_sha256="cd" * 32)
        assert log.recover(recipe_sha256="ab" * 32).rehandled > 0


# --- damage --------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_passed_over_and_events_fill_the_gap(
    tmp_path: Path,
) -> None:
    server = serve(tmp_path, 12, every=4)
    wanted = fingerprint(server.state, make_coordinator())
    server.log.close()
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    with connection:
        connection.execute(
            "UPDATE checkpoints SET state = x'00' WHERE id = (SELECT MAX(id) FROM checkpoints)"
        )
    connection.close()
    log = DurableLog(tmp_path, make_coordinator())
    recovered = log.recover()
    assert fingerprint(recovered.state, make_coordinator()) == wanted
    assert len(recovered.warnings) == 1 and "was passed over" in recovered.warnings[0]
    log.close()


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_upload_is_refused_by_name_or_dropped_on_request(
    tmp_path: Path, damage: str
) -> None:
    server = serve(tmp_path, 9, every=4)
    before = server.state.received
    server.log.close()
    with RunReader(tmp_path) as reader:
        rows = [row for row in reader.rows(name="UpdateArrived")][-2:]
    path = tmp_path / "checkpoints" / f"{rows[0].body['adapter']}.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with (
        DurableLog(tmp_path, make_coordinator()) as log,
        pytest.raises(JournalError, match=rf"after row \d+: .*{path.stem}.* or recover with drop_"),
    ):
        log.recover()
    server = Server.restart(tmp_path, make_coordinator(), drop_damaged=True)
    assert server.state.received < before
    assert server.log._journal.seq < rows[0].seq
    for _ in range(5):
        server.step()
    server.log.close()
    server = Server.restart(tmp_path, make_coordinator())
    assert server.handled == 0
    server.log.close()


def test_a_record_that_leads_elsewhere_is_refused_with_both_sides(tmp_path: Path) -> None:
    serve(tmp_path, 9, every=100).log.close()
    with (
        DurableLog(tmp_path, make_coordinator(server_step=0.5)) as log,
        pytest.raises(
            JournalError, match=r"row \d+ \(UpdateArrived .* On record: Publish .* Now: Publish"
        ),
    ):
        log.recover()


# --- signal 9 ------------------------------------------------------------------------------


def states_of_an_undisturbed_server(root: Path, steps: int) -> list[str]:
    """The state before the first event and after each one."""
    coordinator = make_coordinator()
    states = [fingerprint(coordinator.initial_state(make_adapter()), coordinator)]
    server = Server.begin(root, coordinator, seen=states)
    for _ in range(steps):
        server.step()
    server.log.close()
    return states


@pytest.mark.parametrize("action", ["create", "take", "checkpoint", "recover"])
def test_killed_at_any_call_nothing_synced_is_lost_and_nothing_is_half(
    tmp_path: Path, processes: ForkServerContext, action: str
) -> None:
    states = states_of_an_undisturbed_server(tmp_path / "expected", steps=10)
    process, connection = start(processes, serving.die_at, tmp_path / "count", action, 0)
    calls = connection.recv()
    process.join()
    process.close()
    connection.close()
    whole = Server.restart(tmp_path / "count", make_coordinator())
    most = states.index(fingerprint(whole.state, make_coordinator()))
    whole.log.close()
    moments = sorted({1, calls - 1, *(round(calls * part / 12) for part in range(1, 12))})
    reached = []
    for moment in moments:
        root = tmp_path / f"run{moment}"
        process, connection = start(processes, serving.die_at, root, action, moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        process.close()
        connection.close()
        if not (root / "journal.sqlite").exists():
            assert action == "create"
            reached.append(-1)
            continue
        server = Server.restart(root, make_coordinator())
        assert server.log._journal.seq == 0 or server.state.started
        reached.append(states.index(fingerprint(server.state, make_coordinator())))
        files = {path.name for path in (root / "checkpoints").iterdir()}
        assert not [name for name in files if name.endswith(".tmp")]
        server.step()
        server.log.close()
    assert reached == sorted(reached)
    if action in ("checkpoint", "recover"):
        assert set(reached) == {most}
    else:
        assert reached[0] < reached[-1] <= most


def test_killed_at_random_moments_no_acknowledged_upload_is_lost_or_applied_twice(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    draw = random.Random(4)
    root, acknowledged = tmp_path / "run", set()
    for attempt in range(6):
        process, connection = start(processes, serving.serve_until_killed, root, attempt)
        assert connection.poll(60)
        time.sleep(draw.uniform(0.05, 0.5))
        kill(process)
        while connection.poll():
            try:
                kind, value = connection.recv()
            except (EOFError, OSError):
                break
            if kind == "acknowledged":
                acknowledged.add(value)
        connection.close()
        server = Server.restart(root, make_coordinator())
        server.log.close()
        with RunReader(root) as reader:
            uploads = list(reader.uploads())
            applied = [one[0] for row in reader.rows(name="Publish") for one in row.body["applied"]]
        assert acknowledged <= {upload.task_id for upload in uploads}
        assert len(applied) == len(set(applied))
        answered = [upload.task_id for upload in uploads]
        assert len(answered) == len(set(answered))
    assert len(acknowledged) > 10


# --- disk ----------------------------------------------------------------------------------


def folder_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / "checkpoints").iterdir())


@pytest.mark.slow
def test_disk_is_bounded_over_thousands_of_events(tmp_path: Path) -> None:
    server = Server.begin(tmp_path, make_coordinator("fedbuff"))
    sizes, files, rows, database = [], [], [], []
    for step in range(1, 1_201):
        server.step()
        if step % 20 == 0:
            server.checkpoint()
            sizes.append(folder_bytes(tmp_path))
            files.append(len(list((tmp_path / "checkpoints").iterdir())))
            rows.append(server.log._journal.seq)
            database.append((tmp_path / "journal.sqlite").stat().st_size)
    assert server.handled > 3_000
    half = len(sizes) // 2
    assert max(sizes[half:]) <= 1.05 * max(sizes[3:half])
    assert max(files[half:]) <= 1.05 * max(files[3:half])
    # Rows are the record itself; nothing else in the database grows with them.
    per_row = (database[-1] - database[half]) / (rows[-1] - rows[half])
    assert per_row < 400
    assert (tmp_path / "journal.sqlite-wal").stat().st_size < 9_000_000
    server.log.close()
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    assert connection.execute("SELECT COUNT(*) FROM checkpoints").fetchone() == (2,)
    connection.close()


def test_pages_that_a_large_state_leaves_behind_are_given_back(tmp_path: Path) -> None:
    server = serve(tmp_path, 4)
    server.state.expired.ids.update(random.Random(1).sample(range(10**15), 200_000))
    for _ in range(2):
        server.checkpoint()
    large = (tmp_path / "journal.sqlite-wal").stat().st_size
    server.state.expired.ids.clear()
    for _ in range(3):
        server.checkpoint()
    server.log.close()
    assert (tmp_path / "journal.sqlite").stat().st_size < large / 5


def test_uploads_for_a_replay_are_kept_up_to_a_size_and_reach_back_at_least_half_of_it(
    tmp_path: Path,
) -> None:
    limit, sizes = 60_000, []
    server = Server.begin(tmp_path, make_coordinator("fedbuff"), replay_bytes=limit)
    for step in range(1, 121):
        server.step()
        if step % 2 == 0:
            server.checkpoint()
            connection = sqlite3.connect(tmp_path / "journal.sqlite")
            seqs = [seq for (seq,) in connection.execute("SELECT seq FROM checkpoints ORDER BY id")]
            connection.close()
            assert len(seqs) <= 5
            payloads = server.log._recorder.payloads
            if len(seqs) > 2:
                sizes.append(payloads._bytes_after(seqs[0]))
            # A server that was started again decides alike.
            if step == 60:
                server.log.close()
                server = Server.restart(tmp_path, make_coordinator("fedbuff"), replay_bytes=limit)
    assert seqs[0] > 0
    assert max(sizes) <= limit
    assert min(sizes[len(sizes) // 2 :]) > 0.4 * limit
    server.log.close()


def test_kept_payloads_reach_back_to_the_start(tmp_path: Path) -> None:
    sizes = {}
    for keep in (False, True):
        server = serve(tmp_path / str(keep), 60, every=3, keep_payloads=keep)
        arrived = server.state.received
        server.log.close()
        sizes[keep] = len(uploads_on_disk(tmp_path / str(keep)))
        again = Server.restart(tmp_path / str(keep), make_coordinator(), drop_damaged=False)
        again.log.close()
    assert sizes[True] > arrived > 4 * sizes[False]


def test_files_reach_the_disk_before_the_rows_that_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    server = serve(tmp_path, 3)

    def synced(path: Path) -> None:
        order.append(path.suffix or "folder")

    monkeypatch.setattr("alignfed.journal.blobs.sync", synced)
    commit = server.log._journal.commit

    def committed(checkpoint: object) -> None:
        order.append("rows")
        commit(checkpoint)  # type: ignore[arg-type]

    monkeypatch.setattr(server.log._journal, "commit", committed)
    server.step()
    assert ".safetensors" in order and order.index("rows") > order.index("folder")
    assert order.count("rows") == 1
    server.log.close()

"""A finished upload stays on the device's disk until it is acknowledged, whatever happens."""

from __future__ import annotations

import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignfed.errors import DeploymentError
from alignfed.flower.outbox import Outbox, OutboxFullError

ROOM = 1 << 20


@pytest.fixture
def outbox(tmp_path):
    box = Outbox(tmp_path / "outbox.sqlite", ROOM)
    yield box
    box.close()


def test_an_upload_waits_until_it_is_acknowledged(outbox):
    outbox.put("r", 3, b"three", {})
    outbox.put("r", 5, b"five", {})
    assert [one.task_id for one in outbox.waiting("r")] == [3, 5]
    assert outbox.acknowledge("r", [3, 4]) == 1
    assert outbox.payload("r", 3) is None
    assert outbox.payload("r", 5) == b"five"


def test_another_run_s_acknowledgement_forgets_nothing(outbox):
    outbox.put("r", 3, b"three", {})
    assert outbox.acknowledge("other", [3]) == 0
    assert outbox.payload("r", 3) == b"three"
    assert outbox.waiting("other") == []


def test_memory_outlives_its_upload_and_changes_with_the_next(outbox):
    outbox.put("r", 1, b"x", {"feedback": b"one", "kept": b"b"})
    outbox.acknowledge("r", [1])
    assert outbox.remembered("r", "feedback") == b"one"
    assert outbox.remembered("other", "feedback") is None
    outbox.put("r", 2, b"x", {"feedback": None})
    assert outbox.remembered("r", "feedback") is None
    assert outbox.remembered("r", "kept") == b"b"


def test_an_outbox_opened_again_holds_the_same_and_is_its_owner_s_alone(outbox, tmp_path):
    outbox.put("r", 1, b"payload", {"kept": b"b"})
    outbox.close()
    again = Outbox(tmp_path / "outbox.sqlite", ROOM)
    assert again.payload("r", 1) == b"payload"
    assert again.remembered("r", "kept") == b"b"
    assert (tmp_path / "outbox.sqlite").stat().st_mode & 0o777 == 0o600
    again.close()


def test_without_room_a_task_is_refused_and_nothing_of_its_run_is_dropped(outbox):
    outbox.put("r", 1, bytes(ROOM // 2), {})
    with pytest.raises(OutboxFullError, match="outbox_bytes"):
        outbox.require_room("r", ROOM // 2 + 1)
    with pytest.raises(OutboxFullError):
        outbox.put("r", 2, bytes(ROOM), {})
    assert [one.task_id for one in outbox.waiting("r")] == [1]
    outbox.require_room("r", ROOM // 2)


def test_other_runs_make_room_oldest_first_and_it_is_logged(outbox, caplog):
    outbox.put("old", 1, bytes(ROOM // 3), {"kept": b"b"})
    outbox.put("newer", 1, bytes(ROOM // 3), {})
    with caplog.at_level(logging.WARNING):
        outbox.put("now", 1, bytes(ROOM // 2), {})
    assert outbox.waiting("old") == [] and outbox.remembered("old", "kept") is None
    assert len(outbox.waiting("newer")) == len(outbox.waiting("now")) == 1
    assert "run old" in caplog.text


def test_the_file_shrinks_when_uploads_are_acknowledged(outbox, tmp_path):
    for turn in range(20):
        outbox.put("r", turn, os.urandom(ROOM // 2), {"feedback": os.urandom(ROOM // 4)})
        outbox.acknowledge("r", [turn])
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert total < ROOM // 2


def test_two_processes_may_use_one_outbox_at_once(outbox, tmp_path):
    other = Outbox(tmp_path / "outbox.sqlite", ROOM)
    outbox.put("r", 1, b"x", {})
    assert other.acknowledge("r", [1]) == 1
    assert outbox.waiting("r") == []
    other.close()


def test_a_damaged_outbox_is_refused_with_a_remedy(tmp_path):
    path = tmp_path / "outbox.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(DeploymentError, match="move a damaged one away"):
        Outbox(path, ROOM)


def test_another_version_s_outbox_is_refused(tmp_path):
    path = tmp_path / "outbox.sqlite"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version=9")
    database.close()
    with pytest.raises(DeploymentError, match="format 9"):
        Outbox(path, ROOM)


WRITER = """
import sys
from pathlib import Path
from alignfed.flower.outbox import Outbox
box, turn = Outbox(Path(sys.argv[1]), 1 << 20), int(sys.argv[2])
while True:
    box.put("r", turn, bytes([turn % 256]) * 60_000, {"feedback": b"%d" % turn})
    print("put", turn, flush=True)
    box.acknowledge("r", [turn - 2])
    print("forgot", turn - 2, flush=True)
    turn += 1
"""


def test_kill_9_at_any_moment_leaves_each_upload_whole_and_its_memory_with_it(tmp_path):
    path, chance, turn = tmp_path / "outbox.sqlite", random.Random(1), 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(turn)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split("\n")
        process.wait()
        process.stdout.close()
        box = Outbox(path, ROOM)
        waiting = [one.task_id for one in box.waiting("r")]
        last = max([turn, *(int(line.split()[1]) for line in said if line.startswith("put "))])
        # What was said to be finished is there; one more may be, cut off before it was said.
        assert waiting[-1] in (last, last + 1)
        for task_id in waiting:
            assert box.payload("r", task_id) == bytes([task_id % 256]) * 60_000
        assert box.remembered("r", "feedback") == b"%d" % waiting[-1]
        forgotten = {int(line.split()[1]) for line in said if line.startswith("forgot ")}
        assert not forgotten & set(waiting)
        turn = waiting[-1] + 1
        box.close()


def test_the_outbox_needs_no_torch():
    code = "import sys, alignfed.flower.outbox; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(DeploymentError):
        Outbox(Path(tmp_path / "missing" / "outbox.sqlite"), ROOM)

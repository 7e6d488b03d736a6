"""A process killed with signal 9 leaves a directory from which the run goes on exactly."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from alignfed.errors import JournalError
from alignfed.journal import RunReader
from tests.journal import scripted


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Children start from a process that has already imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "alignfed.journal", "alignfed.core.coordinator"])
    return context


def start(
    processes: ForkServerContext, target: Callable[..., None], *arguments: Any
) -> tuple[ForkServerProcess, Connection]:
    ours, theirs = processes.Pipe()
    process = processes.Process(target=target, args=(*arguments, theirs))
    process.start()
    theirs.close()
    return process, ours


def kill(process: ForkServerProcess) -> None:
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process.close()


def check_whole(root: Path, expected: scripted.Undisturbed) -> None:
    """Recover, and compare rows, tables, files and state with an undisturbed run's."""
    journal, checkpoints = scripted.reopen(root)
    with journal:
        recovered = checkpoints.recover()
        assert recovered.warnings == ()
        rows = list(journal.rows_without_wall_time())
        files = {path.name for path in journal.directory.checkpoints.iterdir()}
    assert rows == expected.advance(0 if recovered.state is None else recovered.state.steps)
    if recovered.state is not None:
        assert scripted.fingerprint(recovered.state) == scripted.fingerprint(expected.state)
    with RunReader(root) as found, RunReader(expected.root) as wanted:
        assert list(found.uploads()) == list(wanted.uploads())
        assert list(found.versions()) == list(wanted.versions())
        assert list(found.evaluations()) == list(wanted.evaluations())
    metrics = [(folder / "metrics.jsonl").read_text() for folder in (root, expected.root)]
    assert metrics[0] == metrics[1]
    assert not [name for name in files if name.endswith(".tmp")]


def test_killed_at_random_moments_a_run_recovers_to_a_prefix_each_time(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    draw = random.Random(20)
    expected = scripted.Undisturbed(tmp_path / "expected")
    attempts, patience_s = 0, 0.1
    with expected.journal:
        while attempts < 8 or expected.state.steps <= 12:
            attempts += 1
            assert patience_s < 60, "no checkpoint is ever reached"
            process, connection = start(processes, scripted.run_until_killed, tmp_path / "run")
            resumed_at = connection.recv()
            time.sleep(draw.uniform(0.0, patience_s))
            kill(process)
            connection.close()
            assert resumed_at == expected.state.steps
            check_whole(tmp_path / "run", expected)
            if expected.state.steps == resumed_at:  # a slow disk needs a longer wait
                patience_s *= 1.5


def test_killed_at_any_call_inside_a_checkpoint_the_old_or_the_new_one_is_whole(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    process, connection = start(processes, scripted.die_while_writing, tmp_path / "count", 0)
    calls = connection.recv()
    process.join()
    assert process.exitcode == 0
    process.close()
    connection.close()
    moments = sorted({1, calls - 1, *(round(calls * part / 20) for part in range(1, 20))})
    reached = []
    expected = scripted.Undisturbed(tmp_path / "expected")
    with expected.journal:
        for moment in moments:
            root = tmp_path / f"run{moment}"
            process, connection = start(processes, scripted.die_while_writing, root, moment)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            process.close()
            connection.close()
            check_whole(root, expected)
            reached.append(expected.state.steps)
    # Later moments never reach less: what a checkpoint has made durable stays so.
    assert reached == sorted(reached)
    assert set(reached) == {12, 24}


def test_two_processes_cannot_run_one_directory_and_a_dead_ones_lock_is_taken_over(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    root = tmp_path / "run"
    process, connection = start(processes, scripted.hold, root)
    assert connection.recv() == "held"
    holder = process.pid
    with pytest.raises(JournalError, match=f"in use by process {holder}") as refusal:
        scripted.reopen(root)
    assert refusal.value.values["pid"] == holder
    kill(process)
    connection.close()
    assert (root / "run.lock").read_text() == f"{holder}\n"
    journal, checkpoints = scripted.reopen(root)
    with journal:
        assert checkpoints.recover().state is None


def test_a_reader_sees_whole_events_while_another_process_writes(
    tmp_path: Path, processes: ForkServerContext
) -> None:
    root = tmp_path / "run"
    process, connection = start(processes, scripted.run_until_killed, root)
    connection.recv()
    seen = []
    with RunReader(root) as reader:
        while len(seen) < 3 and process.is_alive():
            last = reader.last()[0]
            if last and last not in seen:
                seen.append(last)
                names = [row.name for row in reader.rows()]
                published = sum(name == "Publish" for name in names)
                assert len(list(reader.versions())) >= published
    kill(process)
    connection.close()
    assert seen == sorted(seen) and len(seen) == 3
    lines = (root / "metrics.jsonl").read_text().splitlines()[:-1]
    assert all(json.loads(line)["kind"] in {"version", "evaluation"} for line in lines)

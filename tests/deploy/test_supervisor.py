"""Real processes: started, restarted, and none left behind, however their keeper ends."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from alignfed.deploy.loglines import BoundedLog, LogKeeper
from alignfed.deploy.processes import connected_to
from alignfed.deploy.records import read_json
from alignfed.deploy.session import marked_processes
from alignfed.deploy.supervisor import Program, Supervisor
from alignfed.errors import DeploymentError

RUNAWAY = "setsid sleep 1000 & setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done' & wait"
"""Starts what leaves its session, one part of which ignores SIGTERM."""


@pytest.fixture
def supervisor(tmp_path):
    keeper = Supervisor(LogKeeper(tmp_path, 10_000, 2), tmp_path / "processes.json")
    yield keeper
    keeper.stop(grace_s=2.0)


def shell(name, script, folder, **more):
    return Program(name, ("sh", "-c", script), folder, **more)


def until(condition, within_s=20.0):
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "did not happen in time"
        time.sleep(0.05)


def test_what_left_its_session_and_ignores_sigterm_is_ended_too(supervisor, tmp_path):
    supervisor.start([shell("runaway", RUNAWAY, tmp_path)])
    until(lambda: len(marked_processes(supervisor.mark)) >= 4)
    supervisor.stop(grace_s=1.0)
    assert marked_processes(supervisor.mark) == []


def test_a_killed_supervisor_leaves_no_process_behind(tmp_path):
    script = f"""
import time
from pathlib import Path
from alignfed.deploy.loglines import LogKeeper
from alignfed.deploy.supervisor import Program, Supervisor
folder = Path({str(tmp_path)!r})
keeper = Supervisor(LogKeeper(folder, 10_000, 2), folder / "processes.json")
keeper.start([Program("runaway", ("sh", "-c", {RUNAWAY!r}), folder)])
print(keeper.mark, flush=True)
time.sleep(1000)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    mark = process.stdout.readline().strip()
    until(lambda: len(marked_processes(mark)) >= 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    until(lambda: not marked_processes(mark))


def test_a_guardian_ended_from_outside_is_replaced(supervisor):
    guardian = supervisor._guardian
    first = guardian.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: guardian._process.poll() is not None)
    supervisor.poll()
    assert guardian.pid != first


def test_a_crashed_program_starts_again_after_pauses_that_double(tmp_path):
    now = [0.0]
    keeper = Supervisor(LogKeeper(tmp_path, 10_000, 2), tmp_path / "p.json", lambda: now[0])
    try:
        keeper.start([shell("crash", "exit 3", tmp_path)])
        pauses = []
        for _ in range(8):
            running = keeper.running["crash"]
            until(lambda: not running.alive)  # noqa: B023
            keeper.poll()
            pauses.append(running.start_again_s - now[0])
            now[0] = running.start_again_s
            keeper.poll()
        assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
        shown = read_json(tmp_path / "p.json")["processes"]["crash"]
        assert shown["restarts"] == 8
        assert shown["last_exit"] == 3
    finally:
        keeper.stop()


def test_a_supernode_taken_for_alive_is_tried_again_at_an_even_pace(tmp_path):
    now = [0.0]
    logs = LogKeeper(tmp_path, 10_000, 2)
    keeper = Supervisor(logs, tmp_path / "p.json", lambda: now[0])
    try:
        keeper.start([shell("node", "echo 'ERROR: Exit Code: 305'; exit 1", tmp_path)])
        for number in range(1, 4):
            running = keeper.running["node"]
            until(lambda: len(logs.last_lines("node")) == number and not running.alive)  # noqa: B023
            keeper.poll()
            assert running.start_again_s - now[0] == 10.0
            now[0] = running.start_again_s
            keeper.poll()
    finally:
        keeper.stop()


def test_a_program_that_ends_before_it_is_ready_is_refused_with_its_last_words(
    supervisor, tmp_path
):
    program = shell("early", "echo 'no such port'; exit 4", tmp_path, ready=lambda: False)
    with pytest.raises(DeploymentError, match=r"early ended with exit code 4.*\n.*no such port"):
        supervisor.start([program])


def test_a_missing_program_names_the_extra(supervisor, tmp_path):
    with pytest.raises(DeploymentError, match=r"alignfed\[deploy\]"):
        supervisor.start([Program("none", ("no-such-program-here",), tmp_path)])


def test_programs_are_stopped_in_order(supervisor, tmp_path):
    script = "trap 'echo {0} >> order; exit 0' TERM; while :; do sleep 0.05; done"
    supervisor.start([shell(name, script.format(name), tmp_path) for name in ("a", "b", "c")])
    time.sleep(0.3)
    supervisor.stop([["c"], ["a"]])
    assert (tmp_path / "order").read_text().split() == ["c", "a", "b"]


def test_logs_hold_what_was_printed_and_stay_bounded(tmp_path):
    logs = LogKeeper(tmp_path, 20_000, 2)
    keeper = Supervisor(logs, tmp_path / "p.json")
    keeper.start([shell("chatty", "seq 1 40000; echo the end; sleep 100", tmp_path)])
    until(lambda: logs.last_lines("chatty")[-1:] == ["the end"])
    keeper.stop()
    written = sorted(tmp_path.glob("chatty.log*"))
    assert [path.name for path in written] == ["chatty.log", "chatty.log.1", "chatty.log.2"]
    assert sum(path.stat().st_size for path in written) <= 3 * (20_000 + 65536)
    kept = "".join(path.read_text() for path in reversed(written))
    assert kept.endswith("39999\n40000\nthe end\n")


def test_a_log_goes_on_where_it_was(tmp_path):
    for text in (b"one\n", b"two\n"):
        log = BoundedLog(tmp_path / "x.log", 100, 1)
        log.write(text)
        log.close()
    assert (tmp_path / "x.log").read_text() == "one\ntwo\n"


def test_running_ends_when_it_is_told_to(supervisor, tmp_path):
    supervisor.start([shell("sleeper", "sleep 100", tmp_path)])
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    supervisor.run(stop)
    assert supervisor.running["sleeper"].alive


def test_a_program_that_says_it_has_given_up_is_started_again(supervisor, tmp_path):
    script = "echo working; sleep 0.3; echo 'I have given up'; sleep 1000"
    supervisor.start([shell("stands", script, tmp_path, gives_up_with="given up")])
    first = supervisor.running["stands"].process.pid

    def again():
        supervisor.poll()
        return supervisor.running["stands"].restarts == 1

    until(again)
    assert supervisor.running["stands"].process.pid != first
    assert supervisor.running["stands"].last_exit == -signal.SIGTERM


def test_a_program_without_a_pulse_is_started_again_and_one_with_a_pulse_is_left(tmp_path):
    now = [0.0]
    keeper = Supervisor(LogKeeper(tmp_path, 10_000, 2), tmp_path / "p.json", lambda: now[0])
    try:
        keeper.start(
            [
                shell("dead", "sleep 1000", tmp_path, pulse=lambda pid: False),
                shell("alive", "sleep 1000", tmp_path, pulse=lambda pid: now[0] % 60 < 5),
            ]
        )
        for second in range(0, 180, 4):
            now[0] = float(second)
            keeper.poll()
        assert keeper.running["alive"].restarts == 0
        assert keeper.running["dead"].restarts == 1
    finally:
        keeper.stop()


def test_a_connection_is_the_pulse_of_a_supernode(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pulse = connected_to(listener.getsockname()[1])
        assert not pulse(os.getpid())
        with socket.create_connection(listener.getsockname()):
            assert pulse(os.getpid())
        assert not pulse(2**22 + 1)

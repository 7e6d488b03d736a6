"""Starts processes, keeps them running, and leaves none behind.

Each runs in a session of its own, so that Ctrl-C on a terminal reaches us alone and we decide the
order in which they end. One that ends unasked is started again after a pause that doubles from one
exit to the next; Flower's SuperNode, for instance, may be refused for as long as the server takes
its former self for alive.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignfed.deploy.loglines import LogKeeper
from alignfed.deploy.records import log_record, write_json
from alignfed.deploy.session import MARK, Guardian, adopt_orphans, end_marked, reap_orphans
from alignfed.errors import DeploymentError

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
STEADY_S = 60.0
"""A process that ran so long starts again after the first pause."""

STILL_ONLINE = "Exit Code: 305"
"""What a SuperNode prints that was refused; the server may still take its former self for alive."""

STILL_ONLINE_PAUSE_S = 10.0
PULSE_EVERY_S = 2.0
SILENCE_S = 90.0
POLL_S = 0.2
GRACE_S = 8.0


@dataclass(frozen=True, slots=True)
class Program:
    """What to run.

    Attributes:
        name: for logs and status; unique in a supervisor.
        command: program and arguments.
        environment: variables beside the inherited ones.
        folder: where it runs.
        ready: whether it is up, asked until it says so; None: as soon as it has started.
        ready_within_s: how long that may take.
        gives_up_with: words after which it does nothing more, though it stands; it is ended then,
            and started again.
        pulse: whether the process of an id shows life, asked every few seconds; one that shows none
            for ``SILENCE_S`` is ended, and started again.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[], bool] | None = None
    ready_within_s: float = 60.0
    gives_up_with: str | None = None
    pulse: Callable[[int], bool] | None = None


@dataclass(slots=True)
class Running:
    """A program's present state; ``time`` is of the supervisor's clock."""

    program: Program
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    restarts: int = 0
    pause_s: float = FIRST_PAUSE_S
    start_again_s: float | None = None
    last_exit: int | None = None
    last_error: str | None = None
    pulse_s: float = 0.0
    asked_s: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None


class Supervisor:
    """Runs programs until it is stopped. Used from one thread."""

    def __init__(
        self,
        logs: LogKeeper,
        status: Path,
        clock: Callable[[], float] = time.monotonic,
        *,
        adopts: bool = False,
    ) -> None:
        """Make a supervisor with no programs.

        Args:
            logs: where the programs' words go.
            status: the file that says what runs (JSON).
            clock: seconds that only grow.
            adopts: whether this process becomes the parent of what its programs leave behind; only
                where nothing else in it starts processes.
        """
        self.mark = secrets.token_hex(16)
        self._logs = logs
        self._status = status
        self._clock = clock
        self._running: dict[str, Running] = {}
        self._adopts = adopts
        if adopts:
            adopt_orphans()
        self._guardian = Guardian(self.mark)
        self._stopped = False

    @property
    def running(self) -> Mapping[str, Running]:
        """All programs by name, in the order they were started."""
        return self._running

    def start(self, programs: Sequence[Program]) -> None:
        """Start programs at once, then wait until each is ready.

        Raises:
            DeploymentError: one ended, or was not ready in time; the message holds its last words.
        """
        for program in programs:
            running = self._running.setdefault(program.name, Running(program))
            self._launch(running)
        for program in programs:
            self._wait_until_ready(self._running[program.name])

    def poll(self) -> None:
        """Note what has ended, start again what is due, and write the status file."""
        if self._guardian.renew():
            log_record("guardian_restarted")
        now_s = self._clock()
        for running in self._running.values():
            if running.start_again_s is None and running.alive:
                self._feel_pulse(running, now_s)
            if running.start_again_s is None and not running.alive:
                self._note_exit(running, now_s)
            if running.start_again_s is not None and now_s >= running.start_again_s:
                running.restarts += 1
                self._launch(running)
        if self._adopts:
            reap_orphans(self._own_pids())
        self._write_status()

    def remove(self, names: Sequence[str], grace_s: float = GRACE_S) -> None:
        """Stop some programs for good, all at once, and wait for them."""
        leaving = [self._running.pop(name) for name in names if name in self._running]
        _end([one.process for one in leaving if one.process is not None], grace_s)

    def run(self, stop: threading.Event, step: Callable[[], bool] | None = None) -> None:
        """Keep everything running until ``stop`` is set or ``step`` returns False."""
        while not stop.wait(POLL_S):
            self.poll()
            if step is not None and not step():
                return

    def stop(self, order: Sequence[Sequence[str]] = (), grace_s: float = GRACE_S) -> None:
        """End everything; calling it again changes nothing.

        Args:
            order: names that end together, group by group; the rest ends last.
            grace_s: seconds a group has before it is killed.
        """
        if self._stopped:
            return
        self._stopped = True
        for group in order:
            self.remove(group, grace_s)
        self.remove(list(self._running), grace_s)
        killed = end_marked(self.mark, grace_s=2.0)
        if killed:
            log_record("killed_at_stop", processes=killed)
        if self._adopts:
            reap_orphans(self._own_pids())
        self._guardian.relieve()
        self._write_status()
        self._logs.close()

    def last_words(self, name: str, lines: int = 12) -> str:
        """Return a program's last lines."""
        return "\n".join(self._logs.last_lines(name)[-lines:])

    def _launch(self, running: Running) -> None:
        program = running.program
        writing = self._logs.pipe(program.name, program.gives_up_with)
        try:
            running.process = subprocess.Popen(
                program.command,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                cwd=program.folder,
                env={**os.environ, **program.environment, MARK: self.mark},
                start_new_session=True,
            )
        except OSError as error:
            raise DeploymentError(
                f"{program.command[0]} cannot be started: {error}; is the extra installed? pip"
                " install 'alignfed[deploy]'",
                name=program.name,
            ) from error
        finally:
            os.close(writing)
        running.started_s = running.pulse_s = self._clock()
        running.start_again_s = None
        log_record("started", process=program.name, pid=running.process.pid)

    def _wait_until_ready(self, running: Running) -> None:
        program = running.program
        if program.ready is None:
            return
        deadline_s = self._clock() + program.ready_within_s
        while not program.ready():
            late = self._clock() > deadline_s
            if running.alive and not late:
                time.sleep(0.1)
                continue
            assert running.process is not None
            happened = (
                f"was not ready after {program.ready_within_s:.0f} s"
                if late
                else f"ended with exit code {running.process.returncode}"
            )
            time.sleep(0.2)  # its last words may still be in the pipe
            raise DeploymentError(
                f"{program.name} {happened}; its last lines:\n{self.last_words(program.name)}",
                name=program.name,
            )

    def _feel_pulse(self, running: Running, now_s: float) -> None:
        """End a process that stands and does nothing."""
        program, process = running.program, running.process
        assert process is not None
        why = "gave_up" if self._logs.heard(program.name) else None
        if program.pulse is not None and now_s - running.asked_s >= PULSE_EVERY_S:
            running.asked_s = now_s
            if program.pulse(process.pid):
                running.pulse_s = now_s
            elif now_s - running.pulse_s > SILENCE_S:
                why = "silent"
        if why is not None:
            log_record("ended_by_us", process=program.name, why=why)
            _end([process], 2.0)

    def _note_exit(self, running: Running, now_s: float) -> None:
        assert running.process is not None
        running.last_exit = running.process.returncode
        if now_s - running.started_s >= STEADY_S:
            running.pause_s = FIRST_PAUSE_S
        words = self._logs.last_lines(running.program.name)
        refused = any(STILL_ONLINE in line for line in words[-12:])
        pause_s = STILL_ONLINE_PAUSE_S if refused else running.pause_s
        running.last_error = next((line for line in reversed(words) if line.strip()), None)
        running.start_again_s = now_s + pause_s
        if not refused:
            running.pause_s = min(LONGEST_PAUSE_S, 2 * running.pause_s)
        log_record(
            "ended",
            process=running.program.name,
            exit_code=running.last_exit,
            again_in_s=pause_s,
            last=running.last_error,
        )

    def _own_pids(self) -> set[int]:
        processes = [one.process for one in self._running.values() if one.process is not None]
        return {process.pid for process in processes} | {self._guardian.pid}

    def _write_status(self) -> None:
        processes = {
            name: {
                "pid": one.process.pid if one.process is not None and one.alive else None,
                "restarts": one.restarts,
                "last_exit": one.last_exit,
                "last_error": one.last_error,
                "up_s": self._clock() - one.started_s if one.alive else None,
            }
            for name, one in self._running.items()
        }
        document = {"time_s": time.time(), "pid": os.getpid(), "processes": processes}
        write_json(self._status, document)


def _end(processes: Sequence[subprocess.Popen[bytes]], grace_s: float) -> None:
    """End processes and their groups: SIGTERM, and after ``grace_s`` seconds SIGKILL."""
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    deadline_s = time.monotonic() + grace_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            log_record("killed", pid=process.pid)
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    # Only while its leader is not reaped is the group's number surely ours.
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, number)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Turn SIGTERM, SIGINT and SIGHUP into a set event for a while. In the main thread only.

    However often they come: what they began must not be interrupted half way.
    """
    stop = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

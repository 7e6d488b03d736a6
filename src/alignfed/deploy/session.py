"""No process is left behind, whatever happens to whoever started it.

Flower's processes start others that leave their process group and outlive their parent. All
inherit their environment, so a mark in it finds every one. Whoever starts processes also starts
this file as a program of its own: it waits until its standard input ends, which the system sees to
however its starter dies, and then ends all that carry the mark. Standard library only: it runs with
``-I``, and reads ``/proc``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

MARK = "ALIGNFED_SESSION"
"""The environment variable."""

RELIEVED = b"done"
"""What a guardian is told when there is nothing left to do for it."""


def marked_processes(mark: str) -> list[int]:
    """Return the ids of all live processes whose environment carries a mark."""
    return [
        int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _carries(entry, mark)
    ]


def end_marked(mark: str, grace_s: float) -> int:
    """End all processes that carry a mark: SIGTERM, and after ``grace_s`` seconds SIGKILL.

    Returns:
        How many had to be killed.
    """
    deadline_s = time.monotonic() + grace_s
    told: set[int] = set()
    while alive := marked_processes(mark):
        if time.monotonic() >= deadline_s:
            break
        for pid in set(alive) - told:
            _signal(pid, mark, signal.SIGTERM)
            told.add(pid)
        time.sleep(0.05)
    killed: set[int] = set()
    # A process may start another while it is being killed, so look until there is none.
    while alive := marked_processes(mark):
        for pid in alive:
            _signal(pid, mark, signal.SIGKILL)
            killed.add(pid)
        time.sleep(0.02)
    return len(killed)


class Guardian:
    """Another process that ends all that carry a mark once this process is gone."""

    def __init__(self, mark: str, grace_s: float = 5.0) -> None:
        """Start it."""
        self._mark = mark
        self._grace_s = grace_s
        self._process = self._start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def renew(self) -> bool:
        """Start it again if it was ended from outside; return whether that was so."""
        if self._process.poll() is None:
            return False
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process = self._start()
        return True

    def relieve(self) -> None:
        """Tell it that there is nothing left to end, and wait for it."""
        with contextlib.suppress(OSError):
            self._process.communicate(RELIEVED, timeout=10)

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name != MARK}
        return subprocess.Popen(
            [sys.executable, "-I", __file__, self._mark, str(self._grace_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
        )


def adopt_orphans() -> None:
    """Make this process the parent of whatever its descendants leave behind when they end."""
    subreaper = 36  # PR_SET_CHILD_SUBREAPER
    ctypes.CDLL(None, use_errno=True).prctl(subreaper, 1, 0, 0, 0)


def reap_orphans(own: Collection[int]) -> None:
    """Take note of adopted processes that have ended, so that no trace of them is left.

    Args:
        own: children that somebody else waits for.
    """
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) not in own and _is_ended_child(entry):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(entry), os.WNOHANG)


def _is_ended_child(pid: str) -> bool:
    try:
        # After the name, which may hold anything: state, then the parent's id.
        state, parent = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return False
    return state == "Z" and int(parent) == os.getpid()


def _carries(pid: str, mark: str) -> bool:
    try:
        # A zombie has no environment, so it does not count as alive.
        environment = Path("/proc", pid, "environ").read_bytes()
    except OSError:
        return False
    return f"{MARK}={mark}".encode() in environment.split(b"\0")


def _signal(pid: int, mark: str, number: int) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            # Looked at again: the id may have passed to another process in between.
            if _carries(str(pid), mark):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)


def _watch(mark: str, grace_s: float) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    said = b""
    while piece := os.read(0, 64):
        said += piece
    if said != RELIEVED:
        end_marked(mark, grace_s)


if __name__ == "__main__":
    _watch(sys.argv[1], float(sys.argv[2]))

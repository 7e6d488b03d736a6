"""What processes print, kept in files of bounded size.

One thread reads all pipes, so that no process ever waits for its words to be written; where the
disk is full they are lost rather than the process stopped.
"""

from __future__ import annotations

import os
import selectors
import threading
from collections import deque
from pathlib import Path

LAST_LINES = 40
"""Lines of each process kept in memory, for status and error messages."""


class BoundedLog:
    """A file that starts anew at a size and keeps a number of old ones, ``x.log.1`` the newest."""

    def __init__(self, path: Path, size_bytes: int, files: int) -> None:
        """Go on with the file at ``path``."""
        self.path = path
        self._size_bytes = size_bytes
        self._files = files
        self._descriptor: int | None = None
        self._written = 0

    def write(self, data: bytes) -> None:
        """Append, as far as the disk lets us."""
        try:
            if self._descriptor is None:
                self._open()
            elif self._written + len(data) > self._size_bytes and self._written:
                self._turn()
            assert self._descriptor is not None
            os.write(self._descriptor, data)
            self._written += len(data)
        except OSError:
            self.close()

    def close(self) -> None:
        """Close the file; the next write opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o600)
        self._written = os.fstat(self._descriptor).st_size

    def _turn(self) -> None:
        self.close()
        name = self.path.name
        for number in range(self._files, 1, -1):
            older = self.path.with_name(f"{name}.{number - 1}")
            if older.exists():
                older.replace(self.path.with_name(f"{name}.{number}"))
        if self._files:
            self.path.replace(self.path.with_name(f"{name}.1"))
        else:
            self.path.unlink(missing_ok=True)
        self._open()


class LogKeeper:
    """Reads the pipes of many processes into their logs."""

    def __init__(self, folder: Path, size_bytes: int, files: int) -> None:
        """Start the thread.

        Args:
            folder: where logs go, as ``<name>.log``.
            size_bytes: size at which a log starts anew.
            files: old logs kept of each.
        """
        self._folder = folder
        self._size_bytes = size_bytes
        self._files = files
        self._lock = threading.Lock()
        self._logs: dict[str, BoundedLog] = {}
        self._lines: dict[str, deque[str]] = {}
        self._phrases: dict[str, str | None] = {}
        self._heard: set[str] = set()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._closing = False
        self._thread = threading.Thread(target=self._read, name="logs", daemon=True)
        self._thread.start()

    def pipe(self, name: str, phrase: str | None = None) -> int:
        """Return the descriptor that a process called ``name`` is to print to.

        The caller closes it once the process has started.

        Args:
            name: of the process.
            phrase: words to look out for (``heard``) until the next pipe of this name.
        """
        reading, writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reading, False)
        with self._lock:
            self._logs.setdefault(
                name, BoundedLog(self._folder / f"{name}.log", self._size_bytes, self._files)
            )
            self._lines.setdefault(name, deque(maxlen=LAST_LINES))
            self._phrases[name] = phrase
            self._heard.discard(name)
            self._selector.register(reading, selectors.EVENT_READ, (name, bytearray()))
        os.write(self._wake_write, b".")
        return writing

    def last_lines(self, name: str) -> list[str]:
        """Return the last lines a process printed, oldest first."""
        with self._lock:
            return list(self._lines.get(name, ()))

    def heard(self, name: str) -> bool:
        """Return whether a process said what was looked out for."""
        with self._lock:
            return name in self._heard

    def close(self) -> None:
        """Read what is still in the pipes, then close everything."""
        self._closing = True
        os.write(self._wake_write, b".")
        self._thread.join(timeout=5)
        with self._lock:
            for key in list(self._selector.get_map().values()):
                os.close(key.fd)
            self._selector.close()
            os.close(self._wake_write)
            for log in self._logs.values():
                log.close()

    def _read(self) -> None:
        while True:
            events = self._selector.select(timeout=0 if self._closing else None)
            busy = False
            for key, _ in events:
                if key.data is None:
                    os.read(key.fd, 4096)
                else:
                    busy = self._drain(key) or busy
            if self._closing and not busy:
                return

    def _drain(self, key: selectors.SelectorKey) -> bool:
        name, partial = key.data
        try:
            data = os.read(key.fd, 65536)
        except BlockingIOError:
            return False
        with self._lock:
            if not data:
                self._selector.unregister(key.fd)
                os.close(key.fd)
                return False
            self._logs[name].write(data)
            partial += data
            *lines, rest = bytes(partial).split(b"\n")
            partial[:] = rest[-4096:]
            said = [line.decode("utf-8", "replace") for line in lines]
            self._lines[name].extend(said)
            phrase = self._phrases[name]
            if phrase is not None and any(phrase in line for line in said):
                self._heard.add(name)
        return True

"""One process writes a run's directory at a time.

The lock is the operating system's, so it ends with its process however that dies; the file that
carries it, with the holder's process id, may stay behind and means nothing by itself.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from alignfed.errors import JournalError

_held: set[Path] = set()
"""Locks of this process: the system's record locks do not conflict within one process, and
closing any descriptor of a file drops them, so a second attempt must not even open it."""


class DirectoryLock:
    """An exclusive lock on a run's directory, held until ``release`` or the process's end."""

    def __init__(self, path: Path) -> None:
        """Take the lock.

        Args:
            path: the lock file, made if missing.

        Raises:
            JournalError: another process, or another part of this one, holds it.
        """
        self._path = path.resolve()
        if self._path in _held:
            raise _in_use(self._path, os.getpid())
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise JournalError(
                f"{self._path} cannot be opened: {error}; make its folder writable",
                path=str(self._path),
            ) from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise _in_use(self._path, int(holder) if holder.isdigit() else None) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor: int | None = descriptor
        _held.add(self._path)

    def release(self) -> None:
        """Give the lock back; calling it again changes nothing."""
        if self._descriptor is None:
            return
        # Emptied, not deleted: a process waiting on the deleted file would lock a ghost.
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = None
        _held.discard(self._path)


def _in_use(path: Path, pid: int | None) -> JournalError:
    holder = f"process {pid}" if pid is not None else "another process"
    return JournalError(
        f"{path.parent} is in use by {holder}; wait for it to end or stop it, then try again",
        path=str(path.parent),
        pid=pid,
    )

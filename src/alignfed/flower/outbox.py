"""Finished uploads on the device's own disk, until the server has said that they are safe there.

An upload and what the client remembers with it (error feedback, factors of its own) are on disk
together or not at all, whenever the process dies: one SQLite transaction, synced before it returns.
Room is bounded. What waits for the run that is being served is never dropped: without room a task
is refused before it is trained. What is left of other runs makes room for it, oldest first.

No torch here: every message to a device may start a process that reads this file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from alignfed.errors import DeploymentError

_log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS uploads (
    run TEXT NOT NULL, task_id INTEGER NOT NULL, finished_s REAL NOT NULL, size INTEGER NOT NULL,
    payload BLOB NOT NULL, PRIMARY KEY (run, task_id)
);
CREATE TABLE IF NOT EXISTS memory (
    run TEXT NOT NULL, name TEXT NOT NULL, changed_s REAL NOT NULL, size INTEGER NOT NULL,
    payload BLOB NOT NULL, PRIMARY KEY (run, name)
);
"""
_FORMAT = 1
_PATIENCE_S = 60.0


class OutboxFullError(DeploymentError):
    """There is no room for another upload."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """An upload that the server has not acknowledged."""

    task_id: int
    size_bytes: int
    finished_s: float


class Outbox:
    """A device's finished uploads and its memory. Several processes may use one at once."""

    def __init__(self, path: Path, max_bytes: int = 1 << 62) -> None:
        """Open the outbox at ``path``, made if missing, readable by its owner alone.

        Args:
            path: the file; its folder must exist.
            max_bytes: room for payloads and memory of all runs together; whoever only reads and
                acknowledges needs none.

        Raises:
            DeploymentError: it cannot be opened, or is damaged, or another version's.
        """
        self._path, self._max_bytes = path, max_bytes
        with self._disk():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._database = sqlite3.connect(
                path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False
            )
            # A rollback journal, not a write-ahead log: a payload is written once, and no second
            # file of its size stays behind. Pages that are freed go back to the disk.
            self._database.execute("PRAGMA auto_vacuum=FULL")
            self._database.execute("PRAGMA journal_mode=DELETE")
            self._database.execute("PRAGMA synchronous=EXTRA")
            found = self._database.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, _FORMAT):
                raise DeploymentError(
                    f"{path} has format {found}, this version of AlignFed reads {_FORMAT}; use the"
                    " version that made it until its uploads are delivered",
                    path=str(path),
                )
            if found == 0:
                with self._transaction():
                    for statement in _SCHEMA.split(";"):
                        self._database.execute(statement)
                    self._database.execute(f"PRAGMA user_version={_FORMAT}")

    def close(self) -> None:
        """Give the file back."""
        self._database.close()

    def put(
        self, run: str, task_id: int, payload: bytes, memory: Mapping[str, bytes | None]
    ) -> None:
        """Keep an upload and what the client remembers with it; both are on disk on return.

        Args:
            run: the server's run.
            task_id: the task that was finished; an earlier upload of it is replaced.
            payload: the upload's bytes.
            memory: new values by name (None forgets one); others stay.

        Raises:
            OutboxFullError: there is no room even without other runs.
            DeploymentError: the disk fails.
        """
        now_s = time.time()
        grown = len(payload) + sum(len(value) for value in memory.values() if value is not None)
        with self._disk(), self._transaction():
            self._database.execute(
                "DELETE FROM uploads WHERE run = ? AND task_id = ?", (run, task_id)
            )
            for name in memory:
                self._database.execute("DELETE FROM memory WHERE run = ? AND name = ?", (run, name))
            self._make_room(run, grown)
            self._database.execute(
                "INSERT INTO uploads VALUES (?, ?, ?, ?, ?)",
                (run, task_id, now_s, len(payload), payload),
            )
            for name, value in memory.items():
                if value is not None:
                    self._database.execute(
                        "INSERT INTO memory VALUES (?, ?, ?, ?, ?)",
                        (run, name, now_s, len(value), value),
                    )

    def require_room(self, run: str, size_bytes: int) -> None:
        """Make sure, before a task is trained, that so much can be kept beside what waits.

        Raises:
            OutboxFullError: it cannot, even without other runs.
        """
        with self._disk(), self._transaction():
            self._make_room(run, size_bytes)

    def payload(self, run: str, task_id: int) -> bytes | None:
        """Return a waiting upload's bytes; None where it is not here (any more)."""
        return self._one("SELECT payload FROM uploads WHERE run = ? AND task_id = ?", run, task_id)

    def remembered(self, run: str, name: str) -> bytes | None:
        """Return what the client remembers under a name since its last upload of this run."""
        return self._one("SELECT payload FROM memory WHERE run = ? AND name = ?", run, name)

    def waiting(self, run: str) -> list[Waiting]:
        """Return the uploads of a run that are not acknowledged, oldest first."""
        with self._disk():
            rows = self._database.execute(
                "SELECT task_id, size, finished_s FROM uploads WHERE run = ? ORDER BY task_id",
                (run,),
            ).fetchall()
        return [Waiting(*row) for row in rows]

    def waiting_of_all(self) -> int:
        """Return how many uploads wait, of all runs together."""
        with self._disk():
            return int(self._database.execute("SELECT COUNT(*) FROM uploads").fetchone()[0])

    def acknowledge(self, run: str, task_ids: Iterable[int]) -> int:
        """Forget uploads that are safe at the server; return how many were here."""
        with self._disk(), self._transaction():
            return sum(
                self._database.execute(
                    "DELETE FROM uploads WHERE run = ? AND task_id = ?", (run, task_id)
                ).rowcount
                for task_id in task_ids
            )

    @property
    def used_bytes(self) -> int:
        """Bytes of all payloads and memory."""
        with self._disk():
            row = self._database.execute(
                "SELECT (SELECT total(size) FROM uploads) + (SELECT total(size) FROM memory)"
            ).fetchone()
        return int(row[0])

    def _make_room(self, run: str, size_bytes: int) -> None:
        """Drop what is left of other runs, oldest first, until there is room."""
        while (missing := self.used_bytes + size_bytes - self._max_bytes) > 0:
            oldest = self._database.execute(
                "SELECT run FROM (SELECT run, finished_s AS at_s FROM uploads UNION ALL"
                " SELECT run, changed_s FROM memory) WHERE run != ?"
                " GROUP BY run ORDER BY max(at_s) LIMIT 1",
                (run,),
            ).fetchone()
            if oldest is None:
                raise OutboxFullError(
                    f"the outbox {self._path} has room for {self._max_bytes} bytes, and {missing}"
                    " more are needed: raise outbox_bytes in device.toml, or wait until the server"
                    " has acknowledged what waits",
                    path=str(self._path),
                    missing=missing,
                )
            dropped = self._database.execute("DELETE FROM uploads WHERE run = ?", oldest).rowcount
            self._database.execute("DELETE FROM memory WHERE run = ?", oldest)
            _log.warning(
                "dropped %d uploads of run %s that nobody asked for, to make room for run %s",
                dropped,
                oldest[0],
                run,
            )

    def _one(self, query: str, *values: object) -> bytes | None:
        with self._disk():
            row = self._database.execute(query, values).fetchone()
        return None if row is None else bytes(row[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise DeploymentError(
                f"the outbox {self._path} cannot be used: {error}; free disk space or make the file"
                " writable, or move a damaged one away (uploads that wait in it are lost)",
                path=str(self._path),
            ) from error

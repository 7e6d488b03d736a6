"""An SQLite file behind our errors: explicit transactions, and damage told from a full disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignfed.errors import JournalError

_LOG_BYTES = 8_000_000
"""Size to which the write-ahead log is cut back once its content is in the database."""

_FREE_PAGES, _FREE_SHARE = 256, 0.1
"""Free pages, in number and as a share of all, up to which they wait to be used again."""


class DamagedError(JournalError):
    """A file of the run's directory is missing or does not hold what was written."""


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, telling damage from a full or locked disk."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise JournalError(
            f"{path}: SQLite says: {error}; check that the file is there, that its folder is"
            " writable and that the disk has space",
            path=str(path),
        ) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error


class Database:
    """A connection to an existing SQLite file."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Open it.

        Raises:
            JournalError: the file is missing, damaged or not accessible.
        """
        self.path = path
        mode = "rw" if writable else "ro"
        with sqlite_errors(path):
            self._connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode={mode}",
                uri=True,
                isolation_level=None,
                timeout=30.0,
            )
            try:
                if writable:
                    # Readers do not stop the writer. FULL costs one fsync a batch of rows and
                    # makes a commit survive a power cut; deleting the files of older checkpoints
                    # relies on that.
                    self._connection.execute("PRAGMA journal_mode=WAL")
                    self._connection.execute("PRAGMA synchronous=FULL")
                    self._connection.execute(f"PRAGMA journal_size_limit={_LOG_BYTES}")
            except sqlite3.Error:
                self._connection.close()
                raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Do all of what the block does to the tables, or nothing.

        Raises:
            JournalError: the file is damaged, locked, or the disk is full.
        """
        with sqlite_errors(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a query over what is committed.

        Raises:
            JournalError: the file is damaged.
        """
        with sqlite_errors(self.path):
            yield from self._connection.execute(sql, parameters)

    def check_pages(self) -> None:
        """Read every page.

        Raises:
            DamagedError: one is not as SQLite wrote it.
        """
        problems = [row[0] for row in self.query("PRAGMA quick_check(1)")]
        if problems != ["ok"]:
            raise _damaged(self.path, problems[0])

    def give_back_pages(self) -> None:
        """Give free pages back to the disk, once there are many.

        Raises:
            JournalError: the file is damaged or cannot be written.
        """
        (free,) = next(self.query("PRAGMA freelist_count"))
        (total,) = next(self.query("PRAGMA page_count"))
        if free > max(_FREE_PAGES, total * _FREE_SHARE):
            # As a script, because a lone statement is taken one step, which frees one page.
            with sqlite_errors(self.path):
                self._connection.executescript("PRAGMA incremental_vacuum")

    def merge_log(self) -> None:
        """Make one plain file of database and write-ahead log, readable on a read-only disk.

        With a reader still attached it stays as it is.
        """
        with suppress(sqlite3.Error):
            self._connection.execute("PRAGMA journal_mode=DELETE")

    def close(self) -> None:
        """Close the connection; calling it again changes nothing."""
        self._connection.close()


def _damaged(path: Path, problem: object) -> DamagedError:
    return DamagedError(
        f"{path} is damaged: {problem}; restore the run's directory from a backup, or begin the"
        " run again in a new one",
        path=str(path),
    )

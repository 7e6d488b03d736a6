"""The journal: rows wait in memory and are committed in batches, each in one transaction.

What is on disk is always a prefix of the run, an event never without its instructions. A journal
that was opened again records only after it was cut back to a checkpoint (``checkpoint.py``).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignfed.core.events import EvaluationFinished, Event, UpdateArrived
from alignfed.core.instructions import Instruction, Publish, Reject
from alignfed.errors import JournalError
from alignfed.journal import derived, rows, schema
from alignfed.journal.atomic import write_atomically
from alignfed.journal.database import Database
from alignfed.journal.directory import RunDirectory
from alignfed.journal.facts import read_facts
from alignfed.journal.lock import DirectoryLock
from alignfed.journal.metrics import MetricsLog

_INSERT = "INSERT INTO rows VALUES (?,?,?,?,?,?,?,?,?)"


@dataclass(frozen=True, slots=True)
class Batching:
    """When waiting rows are committed: whichever comes first, and at every checkpoint.

    Attributes:
        max_rows: rows waiting.
        max_chars: characters of their bodies.
        max_wait_s: wall-clock seconds since the last commit, seen when the next row comes.
    """

    max_rows: int = 20_000
    max_chars: int = 8_000_000
    max_wait_s: float = 1.0


class SqliteJournal:
    """Implements ``core.ports.Journal`` on ``journal.sqlite`` of a run's directory."""

    def __init__(
        self,
        root: Path,
        *,
        checksums: bool = True,
        batching: Batching | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the journal that is in ``root``, to be cut back before anything is recorded.

        Args:
            root: the run's directory.
            checksums: hash the adapter of each accepted upload.
            batching: when waiting rows are committed.
            wall_clock: seconds, for ``wall_time_s`` and for batching alone.

        Raises:
            JournalError: there is no run, it is in use, damaged or of another format.
        """
        self.directory = RunDirectory(root)
        if not self.directory.holds_run():
            raise JournalError(
                f"{root} holds no run: {self.directory.journal.name} is missing; check the path",
                path=str(root),
            )
        self._checksums = checksums
        self._batching = batching or Batching()
        self._wall_clock = wall_clock
        self._committed_at = wall_clock()
        self._metrics = MetricsLog(self.directory.metrics)
        self._derived: derived.DerivedTables | None = None
        self._waiting: list[tuple[Any, ...]] = []
        self._waiting_chars = 0
        self.seq = 0
        self.keeps_payloads = False
        self._lock = DirectoryLock(self.directory.lock)
        try:
            self.database = Database(self.directory.journal, writable=True)
            try:
                self.meta = schema.read_meta(self.database)
                facts = read_facts(self.meta)
                self.keeps_payloads = facts is not None and facts.keep_payloads
            except BaseException:
                self.database.close()
                raise
        except BaseException:
            self._lock.release()
            raise

    @classmethod
    def create(
        cls,
        root: Path,
        meta: schema.RunMeta,
        *,
        first: Callable[[RunDirectory], schema.CheckpointRow] | None = None,
        **options: Any,
    ) -> SqliteJournal:
        """Begin a run's journal in ``root``, made if missing; options as for the constructor.

        Args:
            root: the run's directory.
            meta: what the run is.
            first: puts the files of a first checkpoint into the directory and returns its row.
            options: as for the constructor.

        Raises:
            JournalError: the directory holds a run already, is in use, or cannot be written.
        """
        directory = RunDirectory(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JournalError(
                f"{root} cannot be made: {error}; choose another directory", path=str(root)
            ) from error
        lock = DirectoryLock(directory.lock)
        try:
            if directory.holds_run():
                raise JournalError(
                    f"{root} already holds a run; resume it, or choose another directory",
                    path=str(root),
                )
            row = None if first is None else first(directory)
            write_atomically(directory.journal, lambda path: schema.make_tables(path, meta, row))
        finally:
            lock.release()
        journal = cls(root, **options)
        journal.cut(0, checkpoint_id=0 if first is None else 1)
        return journal

    def record(
        self, event: Event, instructions: Sequence[Instruction], *, payload: str | None = None
    ) -> None:
        """Append an event and the instructions it led to.

        Args:
            event: what happened.
            instructions: what it led to.
            payload: checksum of an upload that was kept.

        Raises:
            JournalError: not cut back yet or closed, an unknown type, or the disk is full.
        """
        tables = self._tables()
        time_s, wall, first = event.time_s, self._wall_clock(), self.seq + 1
        led_to: list[tuple[Any, ...]] = []
        chars, seq = 0, first
        derives: list[tuple[int, Publish | Reject]] = []
        for instruction in instructions:
            seq += 1
            fields = rows.encode_instruction(instruction)
            led_to.append((seq, time_s, "instruction", *fields, wall))
            chars += len(fields[4])
            if isinstance(instruction, (Publish, Reject)):
                derives.append((seq, instruction))
        refused = None
        upload = event.update if isinstance(event, UpdateArrived) else None
        if upload is None:
            told = rows.encode_event(event)
        else:
            refused = derived.find_refusal(upload, derives) if derives else None
            # A refused upload is never hashed: it may be huge, or not what it claims to be.
            checksum = payload
            if checksum is None and self._checksums and refused is None:
                checksum = upload.adapter.checksum
            told = rows.encode_upload(upload, checksum)
        chars += len(told[4])
        try:
            if upload is not None:
                tables.arrived(first, time_s, upload, told, refused)
            elif isinstance(event, EvaluationFinished):
                tables.evaluated(first, event)
            for number, made in derives:
                if isinstance(made, Publish):
                    tables.published(number, time_s, made)
                elif refused is None or refused[0] != number:
                    tables.rejected(number, time_s, made)
            waiting = self._waiting
            waiting.append((first, time_s, "event", *told, wall))
            waiting += led_to
            self.seq = seq
        except BaseException:
            # An interrupt in here leaves half an event in memory, which must not reach the disk.
            self._derived = None
            raise
        self._commit_if_due(chars, wall)

    def record_cohort(self, time_s: float, task_ids: Sequence[int]) -> None:
        """Append which tasks were computed together.

        Raises:
            JournalError: not cut back yet or closed, or the disk is full.
        """
        self._record_other(time_s, "cohort", rows.encode_cohort(task_ids))

    def record_note(self, time_s: float, name: str, values: Mapping[str, Any]) -> None:
        """Append a fact of the driver's that is neither event nor instruction.

        A note is part of what two runs of one seed must share; keep wall-clock facts out of it.

        Raises:
            JournalError: not cut back yet or closed, or the disk is full.
        """
        self._record_other(time_s, "note", (name, None, None, None, rows.encode_mapping(values)))

    def flush(self) -> None:
        """Commit all that waits; when this returns, it is on disk.

        Raises:
            JournalError: the disk is full or fails; what waits is kept and can be tried again.
        """
        self.commit(None)

    def commit(self, checkpoint: schema.CheckpointRow | None) -> None:
        """Commit all that waits, together with a checkpoint, in one transaction.

        Raises:
            JournalError: the disk is full or fails; what waits is kept and can be tried again.
        """
        tables = self._tables()
        self._committed_at = self._wall_clock()
        if not self._waiting and checkpoint is None:
            return
        try:
            with self.database.transaction() as connection:
                connection.executemany(_INSERT, self._waiting)
                tables.write(connection)
                if checkpoint is not None:
                    schema.insert_checkpoint(connection, checkpoint, self._committed_at)
            self._waiting.clear()
            self._waiting_chars = 0
            lines = tables.clear()
        except JournalError:
            raise
        except BaseException:
            # After an interrupt nobody knows whether these rows are on disk: take no more.
            self._derived = None
            raise
        self._metrics.append(lines)

    def cut(self, seq: int, checkpoint_id: int = 0) -> None:
        """Take back all rows after ``seq`` and all checkpoints after ``checkpoint_id``.

        Cohorts and notes taken back stay in ``undone`` until a checkpoint has passed them. From
        here on the journal records; ``metrics.jsonl`` is written anew from what is left.

        Raises:
            JournalError: the journal is damaged or cannot be written.
        """
        with self.database.transaction() as connection:
            derived.cut(connection, seq)
            connection.execute("DELETE FROM checkpoints WHERE id > ?", (checkpoint_id,))
        self._metrics.rewrite(derived.metrics_lines(self.database))
        self._derived = derived.load(self.database)
        self.seq = seq

    def rows_without_wall_time(self) -> Iterator[tuple[Any, ...]]:
        """Yield what two runs of one seed must share: all of ``rows`` but the wall clock."""
        if self._derived is not None:
            self.flush()
        yield from self.database.query(
            "SELECT seq, time_s, kind, name, client_id, task_id, version, body FROM rows"
            " ORDER BY seq"
        )

    def digest(self) -> str:
        """SHA-256 over ``rows_without_wall_time``, as 64 hexadecimal digits."""
        found = hashlib.sha256()
        for row in self.rows_without_wall_time():
            found.update(repr(row).encode())
        return found.hexdigest()

    def close(self) -> None:
        """Commit what waits and give the directory back; calling it again changes nothing.

        Raises:
            JournalError: what waits cannot be written; the directory is given back all the same.
        """
        try:
            if self._derived is not None:
                self.flush()
        finally:
            self._derived = None
            self._metrics.close()
            self.database.merge_log()
            self.database.close()
            self._lock.release()

    def __enter__(self) -> SqliteJournal:
        """Return itself; the block's end closes it."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def _tables(self) -> derived.DerivedTables:
        if self._derived is None:
            raise JournalError(
                f"the journal of {self.directory.root} takes no rows: it is closed, or was opened"
                " again and not recovered yet",
                path=str(self.directory.root),
            )
        return self._derived

    def _record_other(self, time_s: float, kind: str, fields: rows.Fields) -> None:
        self._tables()
        wall = self._wall_clock()
        try:
            self._waiting.append((self.seq + 1, time_s, kind, *fields, wall))
            self.seq += 1
        except BaseException:
            self._derived = None
            raise
        self._commit_if_due(len(fields[4]), wall)

    def _commit_if_due(self, chars: int, wall: float) -> None:
        self._waiting_chars += chars
        batching = self._batching
        if (
            len(self._waiting) >= batching.max_rows
            or self._waiting_chars >= batching.max_chars
            # The clock may also be set back.
            or not 0 <= wall - self._committed_at < batching.max_wait_s
        ):
            self.commit(None)

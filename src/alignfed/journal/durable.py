"""A deployed server's record: on disk before anybody outside hears of it.

``record`` takes an event with what it led to; ``sync`` returns once all of that, payloads included,
would survive a power cut. Only then may instructions be carried out and uploads be acknowledged.
What devices sent cannot be computed again, so recovery does not cut the record back: it handles
the recorded events once more, which must lead to the recorded instructions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignfed.core.adapter import Adapter
from alignfed.core.coordinator import Coordinator
from alignfed.core.events import Event, UpdateArrived, UploadRefused
from alignfed.core.instructions import Instruction
from alignfed.core.state import CoordinatorState
from alignfed.errors import JournalError
from alignfed.journal.answers import RecordedCalibrator
from alignfed.journal.blobs import BlobStore
from alignfed.journal.checkpoint import Checkpoints, put_checkpoint
from alignfed.journal.codec import Codec, rule_state_class
from alignfed.journal.database import DamagedError
from alignfed.journal.directory import RunDirectory
from alignfed.journal.facts import facts_of
from alignfed.journal.recorded import read_rows, recorded_events
from alignfed.journal.recorder import Recorder
from alignfed.journal.rehandle import Divergence, describe, rehandle
from alignfed.journal.rows import integer
from alignfed.journal.schema import CheckpointRow, RunMeta
from alignfed.journal.serving import RecoveredServer, ServerState, open_instructions
from alignfed.journal.store import Batching, SqliteJournal

RECOVERY_TOLERANCE = 1e-4
"""How far recovery may end from the record in numbers; after an update of torch, bits differ."""

REPLAY_BYTES = 256_000_000
"""What a server keeps so that its last events can be replayed, beyond what recovery needs."""

_ON_REQUEST = Batching(max_rows=2**62, max_chars=2**62, max_wait_s=math.inf)
"""Rows never go to disk before the files they name."""


class DurableLog:
    """Implements ``core.ports.Journal`` for a driver in real time. One thread uses it.

    What ``record`` was given and could not take leaves a coordinator ahead of its record: after an
    error, open the directory again and recover.

    A driver's loop::

        with DurableLog.create(root, meta, coordinator, adapter) as log:   # a new run
            coordinator, state = log.coordinator, log.coordinator.initial_state(adapter)
        with DurableLog(root, coordinator) as log:                         # a restarted server
            recovered = log.recover()
            coordinator, state = log.coordinator, recovered.state

        for event in arrived:
            state, instructions = coordinator.handle(state, event)
            log.record(event, instructions)
        log.sync()                # one wait for the disk for all of them
        ...                       # now carry out the instructions, acknowledge the uploads
        log.checkpoint(state)     # now and then: bounds recovery time and disk

    Attributes:
        directory: the run's directory.
        meta: what the run is.
        coordinator: the one to use: its calibrator's answers go on record too.
    """

    def __init__(
        self,
        root: Path,
        coordinator: Coordinator,
        *,
        replay_bytes: int = REPLAY_BYTES,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the record of a run that was begun, to be recovered before it takes events.

        Args:
            root: the run's directory.
            coordinator: as the run's recipe makes it.
            replay_bytes: how much to keep for replays, beyond what recovery needs.
            wall_clock: seconds, for ``wall_time_s`` alone.

        Raises:
            JournalError: there is no run, it is in use, damaged or of another format.
        """
        journal = SqliteJournal(root, batching=_ON_REQUEST, wall_clock=_forward(wall_clock))
        self._journal = journal
        self.directory = journal.directory
        self.meta: Mapping[str, str] = journal.meta
        self._plain = coordinator
        self._server: ServerState | None = None
        self._unsynced: set[tuple[int, int]] = set()
        try:
            self._recorder = Recorder(journal, keep_bytes=replay_bytes)
            self._checkpoints = Checkpoints(journal, _codec(coordinator), self._recorder.payloads)
            with journal.database.transaction() as connection:
                connection.execute(
                    "CREATE INDEX IF NOT EXISTS uploads_by_task ON uploads (task_id, client_id)"
                )
        except BaseException:
            journal.close()
            raise
        self.coordinator = self._recorder.observe(coordinator)

    @classmethod
    def create(
        cls,
        root: Path,
        meta: RunMeta,
        coordinator: Coordinator,
        adapter: Adapter,
        *,
        keep_payloads: bool = False,
        replay_bytes: int = REPLAY_BYTES,
        wall_clock: Callable[[], float] = time.time,
    ) -> DurableLog:
        """Begin a run's record with a checkpoint of the state before the first event.

        Args:
            root: the run's directory, made if missing.
            meta: what the run is.
            coordinator: as the run's recipe makes it.
            adapter: version 0.
            keep_payloads: keep every upload from the start, so that the whole run can be replayed.
            replay_bytes: else, how much to keep for replays, beyond what recovery needs.
            wall_clock: seconds, for ``wall_time_s`` alone.

        Raises:
            JournalError: the directory holds a run already, is in use, or cannot be written.
        """
        facts = facts_of(coordinator, keep_payloads=keep_payloads)
        state = ServerState(coordinator.initial_state(adapter))

        def first(directory: RunDirectory) -> CheckpointRow:
            return put_checkpoint(state, 0, _codec(coordinator), BlobStore(directory.checkpoints))

        # The journal appears together with its first checkpoint: a run has begun, or it has not.
        SqliteJournal.create(root, replace(meta, replay=facts.to_text()), first=first).close()
        log = cls(root, coordinator, replay_bytes=replay_bytes, wall_clock=wall_clock)
        try:
            log.recover()
        except BaseException:
            log.close()
            raise
        return log

    def record(self, event: Event, instructions: Sequence[Instruction]) -> None:
        """Take an event and the instructions it led to; they are on disk after ``sync``.

        Raises:
            JournalError: not recovered yet or closed, an unknown type, or the disk is full.
        """
        server, self._server = self._recovered(), None
        self._recorder.record(event, instructions)
        server.note(event, instructions)
        self._server = server
        if isinstance(event, UpdateArrived):
            self._unsynced.add((event.update.task_id, event.update.client_id))
        elif isinstance(event, UploadRefused):
            self._unsynced.add((event.task_id, event.client_id))

    def record_cohort(self, time_s: float, task_ids: Sequence[int]) -> None:
        """Take which tasks were computed together; devices on their own never are.

        Raises:
            JournalError: not recovered yet or closed, or the disk is full.
        """
        self._journal.record_cohort(time_s, task_ids)

    def record_note(self, time_s: float, name: str, values: Mapping[str, Any]) -> None:
        """Take a fact of the driver's that is neither event nor instruction.

        Raises:
            JournalError: not recovered yet or closed, or the disk is full.
        """
        self._journal.record_note(time_s, name, values)

    def sync(self) -> None:
        """Return once everything recorded so far is on disk.

        Raises:
            JournalError: the disk is full or fails; nothing recorded since the last ``sync`` may
                be acted upon.
        """
        self._recorder.payloads.blobs.sync()
        self._journal.flush()
        self._unsynced.clear()

    def checkpoint(self, state: CoordinatorState) -> None:
        """Write the state down, with all recorded so far; drop what recovery no longer needs.

        Raises:
            JournalError: the disk is full or fails.
        """
        server = self._recovered()
        server.coordinator = state
        self._recorder.payloads.blobs.sync()
        self._checkpoints.write(server)
        self._unsynced.clear()
        self._journal.database.give_back_pages()

    def recover(
        self, *, recipe_sha256: str | None = None, drop_damaged: bool = False
    ) -> RecoveredServer:
        """Return the state after the last recorded event: newest whole checkpoint, then events.

        Args:
            recipe_sha256: hash of the recipe the run must have been begun with.
            drop_damaged: where a recorded upload's payload is damaged, take back that event and
                all after it, with a warning, instead of refusing.

        Raises:
            JournalError: damaged beyond that, another recipe, or handling the recorded events
                again leads to other instructions than those on record.
        """
        journal = self._journal
        self._checkpoints.check(recipe_sha256)
        warnings: list[str] = []
        found = self._checkpoints.newest_whole(warnings)
        if found is None:
            raise JournalError(
                f"{self.directory.root} holds no checkpoint: its run was never begun; begin it"
                " anew in another directory",
                path=str(self.directory.root),
            )
        saved, server = found
        count, last_seq = self._rehandle(server, saved.row.seq, drop_damaged, warnings)
        journal.cut(last_seq, saved.checkpoint_id)
        self._recorder.payloads.load(journal.database, self._checkpoints.oldest_seq())
        self._checkpoints.collect()
        journal.database.give_back_pages()
        self._server = server
        last = list(journal.database.query("SELECT time_s FROM rows ORDER BY seq DESC LIMIT 1"))
        time_s = last[0][0] if last else 0.0
        return RecoveredServer(
            server.coordinator,
            open_instructions(server, self.coordinator.exchange),
            time_s,
            count,
            tuple(warnings),
        )

    def holds_upload(self, task_id: int, client_id: int) -> bool:
        """Return whether a client's answer to a task was recorded, so that it need not be again."""
        if (task_id, client_id) in self._unsynced:
            return True
        if integer(task_id) is None or integer(client_id) is None:
            return False
        query = "SELECT 1 FROM uploads WHERE task_id = ? AND client_id = ? LIMIT 1"
        return bool(list(self._journal.database.query(query, (task_id, client_id))))

    def close(self) -> None:
        """Write what waits and give the directory back; calling it again changes nothing.

        Raises:
            JournalError: what waits cannot be written; the directory is given back all the same.
        """
        try:
            self._recorder.payloads.blobs.sync()
        finally:
            self._journal.close()

    def __enter__(self) -> DurableLog:
        """Return itself; the block's end closes it."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def _recovered(self) -> ServerState:
        if self._server is None:
            raise JournalError(
                f"the record of {self.directory.root} takes nothing: it was not recovered yet, or"
                " an event could not be recorded; open it again and recover",
                path=str(self.directory.root),
            )
        return self._server

    def _rehandle(
        self, server: ServerState, seq: int, drop_damaged: bool, warnings: list[str]
    ) -> tuple[int, int]:
        """Bring the state from row ``seq`` to the last row that counts; return events and row."""
        database, blobs = self._journal.database, self._recorder.payloads.blobs
        coordinator, real = self._plain, self._plain.calibrator
        if real is not None:
            recorded = RecordedCalibrator(real.tokens, blobs.tensor, lambda: real, exact=False)
            coordinator = replace(coordinator, calibrator=recorded)
        events = recorded_events(read_rows(database, after=seq))
        count = inexact = 0
        try:
            for one in rehandle(
                coordinator,
                server.coordinator,
                events,
                blobs.adapter,
                tolerance=RECOVERY_TOLERANCE,
            ):
                if one.divergence is not None:
                    raise self._diverged(one.divergence)
                server.coordinator = one.state
                server.note(one.event, one.instructions)
                count += 1
                inexact += not one.exact
                seq = one.recorded.last_seq
        except DamagedError as error:
            if not drop_damaged:
                raise JournalError(
                    f"the record of {self.directory.root} is damaged after row {seq}: {error}; or"
                    " recover with drop_damaged, which takes back that event and all after it",
                    path=str(self.directory.root),
                    seq=seq,
                ) from error
            warnings.append(f"all after row {seq} was taken back: {error}")
            return count, seq
        if inexact:
            warnings.append(
                f"{inexact} of {count} events handled again ended in other bits than on record,"
                f" within {RECOVERY_TOLERANCE:g}: torch or the machine is another than before"
            )
        ((last,),) = list(database.query("SELECT MAX(seq) FROM rows"))
        return count, max(seq, last or 0)

    def _diverged(self, found: Divergence) -> JournalError:
        return JournalError(
            f"the record of {self.directory.root} cannot be handled again: at row"
            f" {found.event.seq} ({describe(found.event, body=False)}) {found.difference}."
            f" On record: {describe(found.expected)}. Now: {describe(found.came)}. Go on with the"
            " version of AlignFed and the recipe that wrote it",
            path=str(self.directory.root),
            seq=found.event.seq,
        )


def _codec(coordinator: Coordinator) -> Codec:
    return Codec(ServerState, rule_state_class(coordinator.rule))


def _forward(wall_clock: Callable[[], float]) -> Callable[[], float]:
    """A clock that is set back would have rows committed before their time."""
    latest = -math.inf

    def read() -> float:
        nonlocal latest
        latest = max(latest, wall_clock())
        return latest

    return read

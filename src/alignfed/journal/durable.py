"""A deployed server's record: on disk before anybody outside hears of it.

``record`` takes an event with what it led to; ``sync`` returns once all of that, payloads
included, would survive a power cut. Only then may instructions be carried out and uploads be
acknowledged. Signatures first; see ``DurableLog``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignfed.core.adapter import Adapter
from alignfed.core.coordinator import Coordinator
from alignfed.core.events import Event
from alignfed.core.instructions import Instruction, Reject
from alignfed.core.state import CoordinatorState
from alignfed.journal.schema import RunMeta


@dataclass(frozen=True, slots=True)
class RecoveredServer:
    """Where a server goes on.

    Attributes:
        state: the coordinator's, after every recorded event.
        instructions: what is still to be carried out: a ``Dispatch`` for every task in flight
            (its device may have it already, or have finished it: task ids are idempotent), an
            ``Evaluate`` for every version whose ``EvaluationFinished`` is not on record, the
            latest ``SetTimer``, and ``Stop`` where the run is over.
        time_s: the driver's clock at the last recorded event; later events must not be earlier.
        rehandled: events handled again after the checkpoint.
        warnings: damage that was met and passed over, in words.
    """

    state: CoordinatorState
    instructions: tuple[Instruction, ...]
    time_s: float
    rehandled: int
    warnings: tuple[str, ...]


class DurableLog:
    """Implements ``core.ports.Journal`` for a driver in real time. One thread uses it.

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
    """

    directory: Any
    meta: Mapping[str, str]

    def __init__(
        self,
        root: Path,
        coordinator: Coordinator,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the record of a run that was begun, to be recovered before it takes events.

        Args:
            root: the run's directory.
            coordinator: as the run's recipe makes it.
            wall_clock: seconds, for ``wall_time_s`` alone.

        Raises:
            JournalError: there is no run, it is in use, damaged or of another format.
        """
        raise NotImplementedError

    @classmethod
    def create(
        cls,
        root: Path,
        meta: RunMeta,
        coordinator: Coordinator,
        adapter: Adapter,
        *,
        keep_payloads: bool = False,
        wall_clock: Callable[[], float] = time.time,
    ) -> DurableLog:
        """Begin a run's record with a checkpoint of the state before the first event.

        Args:
            root: the run's directory, made if missing.
            meta: what the run is.
            coordinator: as the run's recipe makes it.
            adapter: version 0.
            keep_payloads: keep every upload from the start, so that the whole run can be replayed;
                else only those that recovery could need.
            wall_clock: seconds, for ``wall_time_s`` alone.

        Raises:
            JournalError: the directory holds a run already, is in use, or cannot be written.
        """
        raise NotImplementedError

    @property
    def coordinator(self) -> Coordinator:
        """The coordinator to use: its calibrator's answers go on record too."""
        raise NotImplementedError

    def record(self, event: Event, instructions: Sequence[Instruction]) -> None:
        """Take an event and the instructions it led to; they are on disk after ``sync``.

        Raises:
            JournalError: not recovered yet or closed, an unknown type, or the disk is full.
        """
        raise NotImplementedError

    def record_refusal(self, time_s: float, reject: Reject) -> None:
        """Take a refusal of the driver's own: of bytes that could not be made an ``Update``.

        The coordinator hears nothing of it; it shows among the rejected uploads.

        Raises:
            JournalError: not recovered yet or closed, or the disk is full.
        """
        raise NotImplementedError

    def record_cohort(self, time_s: float, task_ids: Sequence[int]) -> None:
        """Part of the port; devices train on their own, so a server records none."""
        raise NotImplementedError

    def record_note(self, time_s: float, name: str, values: Mapping[str, Any]) -> None:
        """Take a fact of the driver's that is neither event nor instruction."""
        raise NotImplementedError

    def sync(self) -> None:
        """Return once everything recorded so far is on disk.

        Raises:
            JournalError: the disk is full or fails; nothing recorded since the last ``sync`` may
                be acted upon.
        """
        raise NotImplementedError

    def checkpoint(self, state: CoordinatorState) -> None:
        """Write the state down, with all recorded so far; drop what recovery no longer needs.

        Raises:
            JournalError: the disk is full or fails.
        """
        raise NotImplementedError

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
        raise NotImplementedError

    def holds_upload(self, task_id: int, client_id: int) -> bool:
        """Return whether a client's answer to a task was recorded, so that it need not be again."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what waits and give the directory back; calling it again changes nothing."""
        raise NotImplementedError

    def __enter__(self) -> DurableLog:
        """Return itself; the block's end closes it."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

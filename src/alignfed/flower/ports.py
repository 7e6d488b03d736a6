"""What the driver asks of those around it: a durable record, who is who, how to speak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import RecordDict

from alignfed.core.adapter import Adapter
from alignfed.core.events import Event
from alignfed.core.instructions import Instruction
from alignfed.core.reasons import RejectReason
from alignfed.core.state import CoordinatorState
from alignfed.core.update import Task
from alignfed.errors import AlignFedError


class Log(Protocol):
    """The record of a run. What was recorded is safe once ``sync`` has returned."""

    def record(self, event: Event, instructions: Sequence[Instruction]) -> None:
        """Take an event and the instructions it led to."""
        ...

    def record_note(self, time_s: float, name: str, values: Mapping[str, Any]) -> None:
        """Take a fact that is neither event nor instruction."""
        ...

    def sync(self) -> None:
        """Return once everything recorded so far is on disk."""
        ...

    def checkpoint(self, state: CoordinatorState) -> None:
        """Write the whole state down."""
        ...

    def holds_upload(self, task_id: int, client_id: int) -> bool:
        """Return whether a client's answer to a task was recorded."""
        ...


class Members(Protocol):
    """Tells which client is behind a node; asked again and again, so that it may change."""

    def client_of(self, node_id: int) -> int | None:
        """Return a node's client; None: it may not take part."""
        ...


class RefusedError(AlignFedError):
    """What a device sent cannot be used.

    Attributes:
        reason: why, as the journal counts it.
    """

    reason: RejectReason

    def __init__(self, message: str, reason: RejectReason) -> None:
        """Keep the reason."""
        super().__init__(message, reason=reason)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a device's reply holds, before anything in it was believed.

    Attributes:
        payloads: finished uploads by task id, not looked into.
        failed: the task the device gives up, if any.
        reason: why, in its words.
        step_s: seconds a local step takes it, if it says so.
    """

    payloads: Mapping[int, Any] = field(repr=False)
    failed: int | None = None
    reason: str = ""
    step_s: float | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """An upload that can be told to the coordinator.

    Attributes:
        base_version: the version it claims to start from; None: it claims none, so it is the
            task's.
        adapter: what travelled, in the layout that was expected.
        num_examples: training examples it claims.
        metrics: what the device reports.
    """

    base_version: int | None
    adapter: Adapter
    num_examples: int
    metrics: Mapping[str, float]


class Dialect(Protocol):
    """How orders and answers are written."""

    message_type: str
    keeps_uploads: bool
    """Whether devices keep finished uploads until they are acknowledged, and send them if asked."""

    def task(
        self, task: Task, sent: Adapter, left_s: float, acknowledged: Sequence[int]
    ) -> RecordDict:
        """Return an order to train.

        Args:
            task: what to do.
            sent: the adapter to start from.
            left_s: seconds until the server stops waiting (infinity: never).
            acknowledged: tasks whose uploads are safe.
        """
        ...

    def collect(self, acknowledged: Sequence[int]) -> RecordDict:
        """Return an order to send what is finished."""
        ...

    def stop(self, acknowledged: Sequence[int]) -> RecordDict:
        """Return the word that the run is over."""
        ...

    def read(self, content: RecordDict, task_id: int | None) -> Answer:
        """Return what a reply to an order holds.

        Args:
            content: of the reply.
            task_id: the task that was ordered, if any.

        Raises:
            RefusedError: it does not say what it must say.
        """
        ...

    def decode(self, task_id: int, payload: Any, base: Adapter) -> Decoded:
        """Return an upload, with every name, shape and dtype as expected.

        Args:
            task_id: the task it must answer.
            payload: from ``read``.
            base: what travels of the adapter that was sent.

        Raises:
            RefusedError: it is not such an upload.
        """
        ...

    def size_bytes(self, content: RecordDict) -> int:
        """Return the bytes that a message takes on the way, nearly."""
        ...


__all__ = ["Answer", "Decoded", "Dialect", "Log", "Members", "RefusedError"]

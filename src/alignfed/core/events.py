"""What has happened, told to the coordinator. Past tense; each carries its time in seconds.

``time_s`` is the driver's clock, virtual or real; the coordinator reads no other.
"""

from __future__ import annotations

from dataclasses import field
from typing import TypeAlias

from alignfed.core.reasons import RejectReason
from alignfed.core.update import Update
from alignfed.core.value import value


@value(frozen=True, slots=True)
class RunStarted:
    """The run begins; the adapter of version 0 is in place."""

    time_s: float


@value(frozen=True, slots=True)
class ClientJoined:
    """A client became reachable and may be given work.

    Attributes:
        step_s: seconds a local step takes it, as it measured itself; None: it does not say.
    """

    time_s: float
    client_id: int
    step_s: float | None = None


@value(frozen=True, slots=True)
class ClientLeft:
    """A client is no longer reachable; a task it holds may still come back."""

    time_s: float
    client_id: int


@value(frozen=True, slots=True)
class UpdateArrived:
    """An upload reached the server.

    Attributes:
        distance: ``core.distance.distance`` of the whole upload from what its client was sent,
            where the driver has worked it out for many at once, which tells that the upload has
            the layout of what was sent; None leaves both to the coordinator.
    """

    time_s: float
    update: Update
    distance: float | None = field(default=None, compare=False)


@value(frozen=True, slots=True)
class UploadRefused:
    """An upload came of which no update can be made: the driver says why it refuses it."""

    time_s: float
    task_id: int
    client_id: int
    reason: RejectReason
    detail: str


@value(frozen=True, slots=True)
class TaskFailed:
    """A client reported, or the driver learned, that a task will not be finished."""

    time_s: float
    task_id: int
    client_id: int
    reason: str


@value(frozen=True, slots=True)
class TimerFired:
    """The time of the latest ``SetTimer`` has come."""

    time_s: float


@value(frozen=True, slots=True)
class EvaluationFinished:
    """The common evaluation set was scored with one version's adapter."""

    time_s: float
    version: int
    loss: float
    score: float | None = None


Event: TypeAlias = (
    RunStarted
    | ClientJoined
    | ClientLeft
    | UpdateArrived
    | UploadRefused
    | TaskFailed
    | TimerFired
    | EvaluationFinished
)

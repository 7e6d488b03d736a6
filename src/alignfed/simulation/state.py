"""What a simulation remembers: clock, tasks on devices, what clients keep, how idle it has been.

The engine alone changes these; a checkpoint holds them whole.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from alignfed.core.adapter import Adapter
from alignfed.core.events import TimerFired
from alignfed.core.ports import TrainingResult
from alignfed.core.state import CoordinatorState
from alignfed.core.update import Task
from alignfed.core.value import value


@value(frozen=True, slots=True)
class UploadDue:
    """The last byte of a task's upload reaches the server."""

    task_id: int


@value(frozen=True, slots=True)
class TaskLost:
    """A device stops working on a task; ``reported`` tells whether the server learns of it."""

    task_id: int
    reason: str
    reported: bool


@value(frozen=True, slots=True)
class AvailabilityChanged:
    """A device comes within reach or leaves it."""

    device_id: int


ClockEvent: TypeAlias = UploadDue | TaskLost | AvailabilityChanged | TimerFired


@dataclass(slots=True)
class RunningTask:
    """A task on a device.

    Attributes:
        task: what was dispatched.
        adapter: where the client starts from.
        arrival_s: when its upload reaches the server (infinity: it never will).
        tokens: tokens its training takes.
        result: what the client computed, once it has been computed.
    """

    task: Task
    adapter: Adapter
    arrival_s: float
    tokens: int
    result: TrainingResult | None = None


@dataclass(slots=True)
class EngineState:
    """Everything needed to go on from here; between two steps it is complete.

    Attributes:
        coordinator: the coordinator's state.
        now_s: virtual time.
        server_free_s: when the server has finished its current work.
        sequence: next sequence number of the clock.
        pending: ``(time_s, sequence, event)`` of everything on the clock.
        running: tasks on devices, by task id.
        on_device: the task each busy device works on, by device id.
        downloaded_bytes: bytes sent to clients.
        uploaded_bytes: bytes received from clients.
        trained_tokens: tokens of the tasks whose uploads arrived.
        server_busy_s: modelled server time so far.
        lost_tasks: tasks that ended without an upload.
        kept: what clients keep of their adapters across tasks, by client id.
        idle: what has happened since the run last came nearer to its end, by kind.
        idle_events: the number of those, where what costs more counts for more.
    """

    coordinator: CoordinatorState
    now_s: float = 0.0
    server_free_s: float = 0.0
    sequence: int = 0
    pending: list[tuple[float, int, ClockEvent]] = field(default_factory=list)
    running: dict[int, RunningTask] = field(default_factory=dict)
    on_device: dict[int, int] = field(default_factory=dict)
    downloaded_bytes: int = 0
    uploaded_bytes: int = 0
    trained_tokens: int = 0
    server_busy_s: float = 0.0
    lost_tasks: int = 0
    kept: dict[int, Adapter] = field(default_factory=dict)
    idle: Counter[str] = field(default_factory=Counter)
    idle_events: int = 0


@dataclass(slots=True)
class RunState:
    """What a checkpoint holds: the engine, and the real time spent so far.

    Attributes:
        engine: the engine's state.
        wall_time_s: real seconds.
    """

    engine: EngineState
    wall_time_s: float


CHECKPOINTED: tuple[type[Any], ...] = (
    UploadDue,
    TaskLost,
    AvailabilityChanged,
    RunningTask,
    EngineState,
    RunState,
)
"""What a simulation's checkpoint holds besides the core's own types."""

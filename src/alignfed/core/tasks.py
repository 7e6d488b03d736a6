"""Clients and the tasks they hold: who is next, what ends a task, and how long a failure costs."""

from __future__ import annotations

import heapq
import math
from collections import deque

from alignfed.core.ports import Scheduler
from alignfed.core.state import ClientRecord, CoordinatorSettings, CoordinatorState
from alignfed.core.update import Task


def join(state: CoordinatorState, client_id: int) -> None:
    """Note that a client can be reached; it waits for work unless it holds some."""
    record = state.clients.get(client_id)
    if record is None:
        record = state.clients[client_id] = ClientRecord()
    record.online = True
    _make_idle(state, client_id, record)


def leave(state: CoordinatorState, client_id: int) -> None:
    """Note that a client cannot be reached; a task it holds may still come back."""
    record = state.clients.get(client_id)
    if record is not None:
        record.online = False


def hand_out(
    state: CoordinatorState,
    settings: CoordinatorSettings,
    now_s: float,
    scheduler: Scheduler | None = None,
) -> list[Task]:
    """Give idle clients tasks, longest wait first, until enough are in flight.

    A scheduler may change the order, hold clients back, and assign local steps; else they may
    follow from the clients' speed.
    """
    held: list[int] = []
    if scheduler is not None:
        free = settings.concurrency - len(state.tasks)
        ready, held = scheduler.line_up(state.schedule, state.idle, free)
        state.idle = deque(ready)
    given: list[Task] = []
    idle, in_flight, version = state.idle, state.tasks, state.version
    deadline_s, by_speed = now_s + settings.task_timeout_s, settings.local_steps
    while idle and len(in_flight) < settings.concurrency:
        client_id = idle.popleft()
        record = state.clients[client_id]
        record.queued = False
        if not record.online:
            continue
        task_id, dispatch, steps = state.next_task_id, record.dispatches, None
        if scheduler is not None:
            steps = scheduler.assign(state.schedule, task_id, client_id, now_s)
        elif by_speed is not None:
            steps = by_speed.assign(state.speeds, client_id)
        task = Task(task_id, client_id, version, dispatch, deadline_s, steps)
        state.next_task_id = task_id + 1
        record.dispatches = dispatch + 1
        record.task_id = task_id
        in_flight[task_id] = task
        given.append(task)
    state.snapshots[version].references += len(given)
    if deadline_s < math.inf:
        state.deadlines.extend([(deadline_s, task.task_id) for task in given])
    if scheduler is not None:
        state.idle.extend(held)
        state.flush_due_s = scheduler.due_s(state.schedule)
    return given


def end_task(
    state: CoordinatorState,
    settings: CoordinatorSettings,
    task: Task,
    now_s: float,
    *,
    failed: bool,
) -> None:
    """Take a task out of flight; a client that failed pauses before it is given another."""
    client_id, version = task.client_id, task.base_version
    del state.tasks[task.task_id]
    snapshot = state.snapshots[version]
    snapshot.references -= 1
    if snapshot.references == 0 and version != state.version:
        del state.snapshots[version]
    record = state.clients[client_id]
    record.task_id = None
    if not failed:
        record.failures = 0
        _make_idle(state, client_id, record)
        return
    record.failures += 1
    backoff_s = settings.retry_backoff_s * 2.0 ** min(record.failures - 1, 62)
    if backoff_s == 0:
        _make_idle(state, client_id, record)
        return
    record.queued = True
    ready_at_s = now_s + min(backoff_s, settings.max_backoff_s)
    heapq.heappush(state.cooling, (ready_at_s, client_id))


def expire(
    state: CoordinatorState, settings: CoordinatorSettings, task: Task, now_s: float
) -> None:
    """Give a task up; an upload that still answers it will be refused as late."""
    state.expired.add(task.task_id)
    end_task(state, settings, task, now_s, failed=True)


def expire_due(state: CoordinatorState, settings: CoordinatorSettings, now_s: float) -> None:
    """Give up every task whose deadline has come."""
    while state.deadlines and state.deadlines[0][0] <= now_s:
        _, task_id = state.deadlines.popleft()
        if (task := state.tasks.get(task_id)) is not None:
            expire(state, settings, task, now_s)


def end_pauses(state: CoordinatorState, now_s: float) -> None:
    """Put clients whose pause is over back into the idle queue."""
    while state.cooling and state.cooling[0][0] <= now_s:
        _, client_id = heapq.heappop(state.cooling)
        state.idle.append(client_id)


def next_due_s(state: CoordinatorState) -> float:
    """Return when the next deadline or the end of a pause comes (infinity: neither is set)."""
    while state.deadlines and state.deadlines[0][1] not in state.tasks:
        state.deadlines.popleft()
    deadline_s = state.deadlines[0][0] if state.deadlines else math.inf
    pause_s = state.cooling[0][0] if state.cooling else math.inf
    return min(deadline_s, pause_s)


def _make_idle(state: CoordinatorState, client_id: int, record: ClientRecord) -> None:
    if record.queued or record.task_id is not None or not record.online:
        return
    record.queued = True
    state.idle.append(client_id)

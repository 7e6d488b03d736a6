"""Clients and the tasks they hold: who is next, what ends a task, and how long a failure costs."""

from __future__ import annotations

import heapq
import math
from collections import deque

from alignfed.core.instructions import Dispatch, Instruction
from alignfed.core.lora.exchange import Exchange
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
    exchange: Exchange,
    scheduler: Scheduler | None,
    now_s: float,
    out: list[Instruction],
) -> int:
    """Give idle clients tasks, longest wait first, until enough are in flight; return how many.

    A scheduler may change the order, hold clients back, and assign local steps; else they may
    follow from the clients' speed.
    """
    held: list[int] = []
    free = settings.concurrency - len(state.tasks)
    if scheduler is not None:
        ready, held = scheduler.line_up(state.schedule, state.idle, free)
        state.idle = deque(ready)
    given, idle, version = 0, state.idle, state.version
    snapshot, by_speed = state.snapshots[version], settings.local_steps
    deadline_s = now_s + settings.task_timeout_s
    while free > 0 and idle:
        client_id = idle.popleft()
        record = state.clients[client_id]
        record.queued = False
        if not record.online:
            continue
        task_id, steps = state.next_task_id, None
        if scheduler is not None:
            steps = scheduler.assign(state.schedule, task_id, client_id, now_s)
        elif by_speed is not None:
            steps = by_speed.assign(state.speeds, client_id)
        task = Task(task_id, client_id, version, record.dispatches, deadline_s, steps)
        state.next_task_id = task_id + 1
        record.dispatches += 1
        record.task_id = task_id
        state.tasks[task_id] = task
        if deadline_s < math.inf:
            state.deadlines.append((deadline_s, task_id))
        sent = snapshot.sent_to(exchange, client_id) if exchange.ranks else snapshot.adapter
        out.append(Dispatch(task, sent))
        given += 1
        free -= 1
    snapshot.references += given
    if scheduler is not None:
        state.idle.extend(held)
        state.flush_due_s = scheduler.due_s(state.schedule)
    return given


def finish(state: CoordinatorState, task: Task) -> None:
    """Take a task out of flight that was answered well; its client waits for another."""
    record = _end(state, task)
    record.failures = 0
    if record.online:
        record.queued = True
        state.idle.append(task.client_id)


def fail(state: CoordinatorState, settings: CoordinatorSettings, task: Task, now_s: float) -> None:
    """Take a task out of flight that came to nothing; its client pauses before it is given another.

    The pause doubles with each failure in a row.
    """
    client_id, record = task.client_id, _end(state, task)
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
    fail(state, settings, task, now_s)


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


def _end(state: CoordinatorState, task: Task) -> ClientRecord:
    version = task.base_version
    del state.tasks[task.task_id]
    snapshot = state.snapshots[version]
    snapshot.references -= 1
    if snapshot.references == 0 and version != state.version:
        del state.snapshots[version]
    record = state.clients[task.client_id]
    record.task_id = None
    return record


def _make_idle(state: CoordinatorState, client_id: int, record: ClientRecord) -> None:
    if record.queued or record.task_id is not None or not record.online:
        return
    record.queued = True
    state.idle.append(client_id)

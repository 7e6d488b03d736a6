"""What devices are told: tasks, collections, the end. Sent again where they get lost.

Orders follow from the coordinator's state. Who may be told something: a client that is online, has
answered everything it was told before, and is not being left alone after a failure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flwr.app import RecordDict

from alignfed.core.coordinator import Coordinator
from alignfed.core.state import CoordinatorState
from alignfed.core.update import Task
from alignfed.flower.inbox import Inbox
from alignfed.flower.pace import Pace
from alignfed.flower.ports import Dialect
from alignfed.flower.post import PostOffice, Sent
from alignfed.flower.roster import Roster
from alignfed.flower.status import ServerStatus

_MOST_DOUBLINGS = 10
"""A pause between questions nobody answers grows to about a thousand times the first."""


@dataclass(frozen=True, slots=True)
class Patience:
    """What is done about orders that get lost.

    Attributes:
        resends: how often a task that was lost on the way is sent again before it counts as failed.
        backoff_s: pause before that; doubles each time.
        away_s: how long a task waits for its device to return.
    """

    resends: int = 3
    backoff_s: float = 1.0
    away_s: float = 120.0


@dataclass(frozen=True)
class Surroundings:
    """What orders and the driver share."""

    coordinator: Coordinator
    dialect: Dialect
    post: PostOffice
    roster: Roster
    inbox: Inbox
    pace: Pace
    status: ServerStatus


class Orders:
    """Sends what is due; knows what was lost, and who may hold uploads that nobody asked for."""

    def __init__(self, around: Surroundings, patience: Patience) -> None:
        """Begin with nothing sent."""
        self._around = around
        self._patience = patience
        self._attempts: dict[int, int] = {}
        self._not_before_s: dict[int, float] = {}
        self._owing: set[int] = set()
        self._told_to_stop: set[int] = set()
        self._silences: dict[int, int] = {}

    def ask_for_uploads(self, client_id: int) -> None:
        """Have a client asked for what it has finished, unless a task will bring it anyway."""
        if self._around.dialect.keeps_uploads:
            self._owing.add(client_id)

    def answered(self, sent: Sent) -> None:
        """Note that an order got through."""
        self._owing.discard(sent.client_id)
        self._silences.pop(sent.client_id, None)
        if sent.task_id is not None:
            self._attempts.pop(sent.task_id, None)

    def unanswered(self, client_id: int, now_s: float) -> None:
        """Note that an order without a task got lost."""
        self._told_to_stop.discard(client_id)
        silences = self._silences[client_id] = self._silences.get(client_id, 0) + 1
        pause_s = self._patience.backoff_s * 2.0 ** min(silences, _MOST_DOUBLINGS)
        self._not_before_s[client_id] = now_s + pause_s

    def lost(self, task: Task, words: str, now_s: float) -> bool:
        """Note that a task got lost on the way; return whether it will be sent again."""
        attempts = self._attempts.pop(task.task_id, 0) + 1
        if attempts > self._patience.resends:
            return False
        self._attempts[task.task_id] = attempts
        pause_s = self._patience.backoff_s * 2.0 ** (attempts - 1)
        self._not_before_s[task.client_id] = now_s + pause_s
        client = self._around.status.client(task.client_id)
        client.last_error, client.last_error_s = words, now_s
        return True

    def hopeless(self, state: CoordinatorState, now_s: float) -> list[Task]:
        """Return tasks in flight whose devices have been away for too long."""
        under_way = self._tasks_under_way()
        return [
            task
            for task in state.tasks.values()
            if task.task_id not in under_way
            and self._around.roster.away_s(task.client_id, now_s) >= self._patience.away_s
        ]

    def send(self, state: CoordinatorState, now_s: float) -> list[Task]:
        """Send every task that no device works on, then ask for uploads; return what failed."""
        under_way = self._tasks_under_way()
        for task_id in self._attempts.keys() - state.tasks.keys():  # given up meanwhile
            del self._attempts[task_id]
        failed = []
        for task in state.tasks.values():
            if task.task_id in under_way or not self._may_order(task.client_id, now_s):
                continue
            if not self._send_task(task, state, now_s):
                failed.append(task)
        for client_id in sorted(self._owing):
            if self._may_order(client_id, now_s):
                safe = self._around.inbox.unconfirmed(client_id)
                self._push(client_id, None, self._around.dialect.collect(safe), now_s)
        return failed

    def close(self, state: CoordinatorState, now_s: float) -> bool:
        """Tell everybody that the run is over; return whether all have answered.

        Whoever went away with a task may have finished it, and has not answered.
        """
        around = self._around
        if not around.dialect.keeps_uploads:
            return True
        for client_id in sorted(around.roster.nodes):
            # Who answered the word with uploads must hear that they are safe.
            due = client_id not in self._told_to_stop or client_id in self._owing
            if due and self._may_order(client_id, now_s):
                content = around.dialect.stop(around.inbox.unconfirmed(client_id))
                if self._push(client_id, None, content, now_s):
                    self._told_to_stop.add(client_id)
                    self._owing.discard(client_id)
        here = set(around.roster.nodes)
        awaited = here | {task.client_id for task in state.tasks.values()}
        return (
            not around.post.under_way and self._told_to_stop >= awaited and not self._owing & here
        )

    def why_unanswered(self, task: Task, now_s: float) -> str:
        """Return what is known, after ``close``, of a task that is still in flight."""
        around, client_id = self._around, task.client_id
        node_id = around.roster.nodes.get(client_id)
        if node_id is None:
            return f"its device had been away for {around.roster.away_s(client_id, now_s):.0f} s"
        if client_id in self._told_to_stop and not around.post.busy(node_id):
            return "its device had nothing to hand in for it"
        return "its device had not answered"

    def _send_task(self, task: Task, state: CoordinatorState, now_s: float) -> bool:
        around = self._around
        snapshot = state.snapshots[task.base_version]
        content = around.dialect.task(
            task,
            snapshot.sent_to(around.coordinator.exchange, task.client_id),
            task.deadline_s - now_s,
            around.inbox.unconfirmed(task.client_id),
        )
        if not self._push(task.client_id, task, content, now_s):
            return False
        client = around.status.client(task.client_id)
        client.task_id, client.base_version = task.task_id, task.base_version
        return True

    def _push(self, client_id: int, task: Task | None, content: RecordDict, now_s: float) -> bool:
        around, pace = self._around, self._around.pace
        sent = Sent(
            node_id=around.roster.nodes[client_id],
            client_id=client_id,
            task_id=None if task is None else task.task_id,
            at_s=now_s,
            ttl_s=pace.word_ttl_s(client_id)
            if task is None
            else pace.ttl_s(client_id, task.steps or 1),
            acknowledged=tuple(around.inbox.unconfirmed(client_id)),
        )
        size_bytes = around.dialect.size_bytes(content)
        if not around.post.push(sent, content):
            self._not_before_s[client_id] = now_s + self._patience.backoff_s
            return False
        around.status.client(client_id).sent_bytes += size_bytes
        around.status.sent_bytes += size_bytes
        return True

    def _may_order(self, client_id: int, now_s: float) -> bool:
        node_id = self._around.roster.nodes.get(client_id)
        return (
            node_id is not None
            and not self._around.post.busy(node_id)
            and now_s >= self._not_before_s.get(client_id, -math.inf)
        )

    def _tasks_under_way(self) -> set[int | None]:
        return {sent.task_id for sent in self._around.post.under_way}


__all__ = ["Orders", "Patience", "Surroundings"]

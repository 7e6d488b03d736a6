"""What a device sent becomes events: uploads, or refusals that say why.

Nothing that a device says is believed that the server knows itself: who it is, which task it was
given, which layout its upload must have. An upload is acknowledged once it is on disk, whether it
was accepted or refused, and again and again until the device has heard of it.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from flwr.app import RecordDict

from alignfed.core import admission
from alignfed.core.coordinator import Coordinator
from alignfed.core.events import (
    ClientJoined,
    Event,
    TaskFailed,
    UpdateArrived,
    UploadRefused,
)
from alignfed.core.reasons import RejectReason
from alignfed.core.state import CoordinatorState
from alignfed.core.update import Update
from alignfed.flower.pace import Pace
from alignfed.flower.ports import Answer, Dialect, Log, RefusedError
from alignfed.flower.post import Sent
from alignfed.flower.status import ServerStatus

_MOST_ACKNOWLEDGED = 256
"""Task ids acknowledged in one message; the others wait for the next."""

_REMEMBERED = 1024
"""Acknowledged task ids remembered a client, to tell a replay from a repetition."""


class Inbox:
    """Reads answers for a driver, and knows what to acknowledge."""

    def __init__(
        self,
        coordinator: Coordinator,
        dialect: Dialect,
        log: Log,
        pace: Pace,
        status: ServerStatus,
    ) -> None:
        """Read for one run."""
        self._coordinator = coordinator
        self._dialect = dialect
        self._log = log
        self._pace = pace
        self._status = status
        # By client: safe and to be acknowledged; taken in, but not safe yet; heard of.
        self._safe: dict[int, dict[int, None]] = {}
        self._taken: list[tuple[int, int]] = []
        self._heard: dict[int, deque[int]] = {}
        self._newcomers: set[int] = set()

    def expect(self, client_id: int) -> None:
        """Have a client join with its next answer, by the speed that it says it has."""
        self._newcomers.add(client_id)

    def expects(self, client_id: int) -> bool:
        """Return whether a client has yet to answer before it joins."""
        return client_id in self._newcomers

    def forget(self, client_id: int) -> None:
        """Expect a client no more: it has left before it joined."""
        self._newcomers.discard(client_id)

    def unconfirmed(self, client_id: int) -> list[int]:
        """Return the uploads of a client that are safe, and that it may not have heard of."""
        return list(self._safe.get(client_id, {}))[:_MOST_ACKNOWLEDGED]

    def confirm(self) -> None:
        """Note that all that was read so far is on disk."""
        for client_id, task_id in self._taken:
            self._safe.setdefault(client_id, {})[task_id] = None
        self._taken.clear()

    def shut_out(self, sent: Sent, now_s: float) -> Event:
        """Return the refusal of an answer by a node that may not take part any more."""
        return UploadRefused(
            now_s,
            -1 if sent.task_id is None else sent.task_id,
            sent.client_id,
            RejectReason.UNKNOWN_CLIENT,
            f"node {sent.node_id} may not take part; its answer was not looked into",
        )

    def read(
        self, sent: Sent, content: RecordDict, state: CoordinatorState, now_s: float
    ) -> tuple[list[Event], bool]:
        """Return the events of an answer, in order, and whether there may be more to ask for.

        Args:
            sent: the message that it answers.
            content: what came; its payloads are let go of as soon as they are read.
            state: the coordinator's.
            now_s: the driver's clock.
        """
        client = self._status.client(sent.client_id)
        size_bytes = self._dialect.size_bytes(content)
        client.received_bytes += size_bytes
        self._status.received_bytes += size_bytes
        self._note_heard(sent)
        try:
            answer = self._dialect.read(content, sent.task_id)
        except RefusedError as error:
            task_id = -1 if sent.task_id is None else sent.task_id
            refusal = UploadRefused(now_s, task_id, sent.client_id, error.reason, str(error))
            return [refusal], False
        if answer.failed is not None:
            return self._failure(sent, answer, state, now_s), False
        events: list[Event] = []
        if sent.client_id in self._newcomers:
            self._newcomers.discard(sent.client_id)
            events.append(ClientJoined(now_s, sent.client_id, answer.step_s))
        more = False
        # The task that was asked for comes first, and is never turned away: how often a device is
        # asked is up to the server, and it asks those who fail less and less.
        task_ids = sorted(answer.payloads, key=lambda one: (one != sent.task_id, one))
        for read, task_id in enumerate(task_ids):
            asked_for = task_id == sent.task_id
            if not asked_for and not self._pace.admit(sent.client_id, now_s):
                left = len(answer.payloads) - read
                events.append(self._too_many(sent, task_id, left, now_s))
                more = False
                break
            event = self._upload(sent, task_id, answer.payloads[task_id], state, now_s)
            # A device sends as much as one reply may hold. What it was not asked for it had kept:
            # it may have kept more, and must hear that this is safe.
            more = more or (not asked_for and _was_kept(event))
            if event is not None:
                client.received += 1
                events.append(event)
            self._taken.append((sent.client_id, task_id))
        return events, more

    def _upload(
        self, sent: Sent, task_id: int, payload: Any, state: CoordinatorState, now_s: float
    ) -> Event | None:
        """Return the event of one upload; None for a repetition of what is safe already."""
        client_id = sent.client_id
        if self._log.holds_upload(task_id, client_id):
            if task_id not in self._heard.get(client_id, ()):
                return None
            words = f"task {task_id} was answered and acknowledged; this is a repetition"
            return UploadRefused(now_s, task_id, client_id, RejectReason.TASK_USED, words)
        task = state.tasks.get(task_id)
        rejection = admission.check_answer(
            task_id,
            client_id,
            known_client=client_id in state.clients,
            in_flight=task,
            expired=state.expired,
            next_task_id=state.next_task_id,
        )
        if rejection is not None:
            return UploadRefused(now_s, task_id, client_id, rejection.reason, rejection.detail)
        if state.stopped is not None:
            words = f"the run ended: {state.stopped}"
            return UploadRefused(now_s, task_id, client_id, RejectReason.RUN_STOPPED, words)
        assert task is not None
        exchange = self._coordinator.exchange
        base = exchange.upload(state.snapshots[task.base_version].sent_to(exchange, client_id))
        try:
            found = self._dialect.decode(task_id, payload, base)
        except RefusedError as error:
            return UploadRefused(now_s, task_id, client_id, error.reason, str(error))
        if task_id == sent.task_id:
            self._pace.learn(client_id, now_s - sent.at_s, task.steps or 1)
        client = self._status.client(client_id)
        client.expected_s = self._pace.expected_s.get(client_id)
        loads = found.metrics.get("model_loads")
        if loads is not None and 0 <= loads < 1e9:
            client.model_loads = int(loads)
        version = task.base_version if found.base_version is None else found.base_version
        update = Update(
            task_id, client_id, version, found.adapter, found.num_examples, found.metrics
        )
        return UpdateArrived(now_s, update)

    def _failure(
        self, sent: Sent, answer: Answer, state: CoordinatorState, now_s: float
    ) -> list[Event]:
        task_id, client_id = answer.failed, sent.client_id
        assert task_id is not None
        client = self._status.client(client_id)
        client.failures += 1
        client.last_error, client.last_error_s = answer.reason, now_s
        task = state.tasks.get(task_id)
        if task is None or task.client_id != client_id:
            return []
        return [TaskFailed(now_s, task_id, client_id, answer.reason)]

    def _too_many(self, sent: Sent, task_id: int, left: int, now_s: float) -> Event:
        limit = self._pace.settings.uploads_per_minute
        return UploadRefused(
            now_s,
            task_id,
            sent.client_id,
            RejectReason.TOO_MANY,
            f"{left} uploads were not looked into: more than {limit:g} a minute that nobody asked"
            f" for came from client {sent.client_id}",
        )

    def _note_heard(self, sent: Sent) -> None:
        """An answer shows that the device has read what its order acknowledged."""
        safe = self._safe.get(sent.client_id, {})
        heard = self._heard.setdefault(sent.client_id, deque(maxlen=_REMEMBERED))
        for task_id in sent.acknowledged:
            if task_id in safe:
                del safe[task_id]
                heard.append(task_id)


def _was_kept(event: Event | None) -> bool:
    """Return whether an upload nobody asked for is one that an honest device would send."""
    if isinstance(event, UploadRefused):
        return event.reason in (RejectReason.TASK_EXPIRED, RejectReason.RUN_STOPPED)
    return True


__all__ = ["Inbox"]

"""Drives the coordinator in real time, over Flower's grid.

One step: see who is online, take in what has come, let timers fire; then wait until all of it is
on disk; only then send orders and acknowledge uploads. Orders follow from the coordinator's state,
not from the moment of its ``Dispatch``: a task in flight that no node is working on is sent, be it
new, lost on the way, or found in the record of a server that was killed. Task ids are idempotent: a
device that has finished a task answers it again without training.

Time is passed in: ``clock`` is asked for seconds, and ``sleep`` is called between steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from alignfed.core.coordinator import Coordinator
from alignfed.core.events import (
    ClientJoined,
    EvaluationFinished,
    Event,
    RunStarted,
    TaskFailed,
    TimerFired,
)
from alignfed.core.instructions import Evaluate, Publish, Reject
from alignfed.core.ports import Evaluation
from alignfed.core.state import CoordinatorState
from alignfed.core.update import Task
from alignfed.flower.inbox import Inbox
from alignfed.flower.orders import Orders, Patience, Surroundings
from alignfed.flower.pace import Pace, PaceSettings
from alignfed.flower.ports import Dialect, Log, Members
from alignfed.flower.post import PostOffice, Reply, Sent
from alignfed.flower.roster import Roster
from alignfed.flower.scoring import Scoring
from alignfed.flower.status import ServerStatus

TRAFFIC_NOTE = "Traffic"
"""Name of the journal's note of bytes sent and received so far."""

PASSED_OVER_NOTE = "EvaluationPassedOver"
"""Name of the journal's note of a version that was not scored, since newer ones waited."""

_RAISED = frozenset({1, 2, 6, 7})
"""Flower's codes for a client app that could not do the task at all: no use in sending it again."""


@dataclass(frozen=True, slots=True)
class DriverSettings:
    """How the driver deals with time and with failures.

    Attributes:
        poll_s: seconds between steps.
        roll_call_s: seconds between looks at who is online.
        start_clients: clients to wait for before the run starts.
        start_wait_s: the longest such wait, once one client is there.
        closing_s: how long, after the end, devices are given to hand in what they have finished;
            longer than the 60 to 100 s for which Flower takes a dead SuperNode for alive and
            refuses the one that is started in its place.
        checkpoint_s: seconds between checkpoints.
        patience: what is done about orders that get lost.
        pace: time-to-live and rates.
    """

    poll_s: float = 0.2
    roll_call_s: float = 1.0
    start_clients: int = 1
    start_wait_s: float = 60.0
    closing_s: float = 120.0
    checkpoint_s: float = 30.0
    patience: Patience = field(default_factory=Patience)
    pace: PaceSettings = field(default_factory=PaceSettings)


@dataclass(frozen=True)
class DriverParts:
    """What a driver is made of.

    Attributes:
        coordinator: decides.
        grid: Flower's, with its run set.
        log: keeps the record.
        dialect: how orders and answers are written.
        members: tells who is behind a node.
        clock: returns seconds; only differences count.
        sleep: waits so many seconds.
        evaluate: scores a version, in a thread of its own; None: evaluations are off.
        settings: times and limits.
        watch: called after each step with the driver.
    """

    coordinator: Coordinator
    grid: Grid
    log: Log
    dialect: Dialect
    members: Members
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    evaluate: Callable[[Evaluate], Evaluation] | None = None
    settings: DriverSettings = field(default_factory=DriverSettings)
    watch: Callable[[Driver], None] | None = None


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a restarted server goes on from, beside the coordinator's state.

    Attributes:
        time_s: the driver's clock at the last recorded event.
        evaluations: versions whose scores are not on record.
        sent_bytes: bytes sent before.
        received_bytes: bytes received before.
    """

    time_s: float
    evaluations: tuple[Evaluate, ...] = ()
    sent_bytes: int = 0
    received_bytes: int = 0


class Driver:
    """A run on real devices. ``run`` to its end, or ``step`` until it returns False."""

    def __init__(
        self, parts: DriverParts, state: CoordinatorState, run: str, recovery: Recovery | None
    ) -> None:
        """Begin the run called ``run``, or go on with a recovered state."""
        settings, began = parts.settings, recovery or Recovery(0.0)
        self.parts = parts
        self.state = state
        self.status = ServerStatus(
            run, sent_bytes=began.sent_bytes, received_bytes=began.received_bytes
        )
        pace = Pace(settings.pace)
        self._post = PostOffice(parts.grid, parts.dialect.message_type)
        self._roster = Roster(self._post, parts.members, self.status, settings.roll_call_s)
        self._inbox = Inbox(parts.coordinator, parts.dialect, parts.log, pace, self.status)
        self._orders = Orders(
            Surroundings(
                parts.coordinator,
                parts.dialect,
                self._post,
                self._roster,
                self._inbox,
                pace,
                self.status,
            ),
            settings.patience,
        )
        self._scoring = None if parts.evaluate is None else Scoring(parts.evaluate)
        self._to_score: list[Evaluate] = list(began.evaluations)
        # Where local steps follow from speed, a new client is asked for its own before it joins.
        by_speed = parts.coordinator.settings.local_steps is not None
        self._greets = by_speed and parts.dialect.keeps_uploads
        self._offset_s = began.time_s - parts.clock()
        self._checkpoint_at_s = began.time_s + settings.checkpoint_s
        self._closing_until_s = math.inf
        self._unsynced = False
        if recovery is not None:
            # Any device may hold uploads that never reached the record.
            for client_id in state.clients:
                self._orders.ask_for_uploads(client_id)
            online = [cid for cid, record in state.clients.items() if record.online]
            self._roster.presume(online, began.time_s)

    def now_s(self) -> float:
        """Return seconds since the run began, its stops left out."""
        return self.parts.clock() + self._offset_s

    def run(self) -> CoordinatorState:
        """Step until the run has ended and devices have handed in what they had finished.

        Raises:
            AlignFedError: the record cannot be written, or an evaluation failed.
        """
        while self.step():
            self.parts.sleep(self.parts.settings.poll_s)
        return self.state

    def step(self) -> bool:
        """Do what is to be done now; return whether there is more to come."""
        now_s = self.now_s()
        self._call_roll(now_s)
        for reply in self._post.fetch(now_s):
            self._read(reply, now_s)
        self._take_scores(now_s)
        if self.state.wake_at_s <= now_s:
            self._take(TimerFired(now_s))
        for task in self._orders.hopeless(self.state, now_s):
            away_s = self._roster.away_s(task.client_id, now_s)
            self._fail(task, f"its device has been away for {away_s:.0f} s", now_s)
        self._sync()
        # From here on everything that was taken in is on disk, and may be acted upon.
        self._score(now_s)
        closed = self._send(now_s)
        if now_s >= self._checkpoint_at_s:
            self.checkpoint()
        self._update_status(now_s)
        if self.parts.watch is not None:
            self.parts.watch(self)
        return not closed

    def checkpoint(self) -> None:
        """Write the whole state down."""
        now_s = self.now_s()
        traffic = {"sent": self.status.sent_bytes, "received": self.status.received_bytes}
        self.parts.log.record_note(now_s, TRAFFIC_NOTE, traffic)
        self.parts.log.checkpoint(self.state)
        self._unsynced = False
        self._inbox.confirm()
        self._checkpoint_at_s = now_s + self.parts.settings.checkpoint_s

    def _take(self, event: Event) -> None:
        self.state, instructions = self.parts.coordinator.handle(self.state, event)
        self.parts.log.record(event, instructions)
        self._unsynced = True
        for instruction in instructions:
            match instruction:
                case Evaluate():
                    self._to_score.append(instruction)
                case Publish(applied=applied) if applied:
                    staleness = [one.staleness for one in applied]
                    self.status.staleness_mean = sum(staleness) / len(staleness)
                    self.status.staleness_max = max(staleness)
                case Reject():
                    client = self.status.client(instruction.client_id)
                    client.refused += 1
                    client.last_error = f"{instruction.reason}: {instruction.detail}"
                    client.last_error_s = event.time_s

    def _sync(self) -> None:
        if self._unsynced:
            self.parts.log.sync()
            self._unsynced = False
        self._inbox.confirm()

    # --- what comes in --------------------------------------------------------------------

    def _call_roll(self, now_s: float) -> None:
        for event in self._roster.call(now_s):
            client_id = event.client_id
            known = client_id in self.state.clients
            if isinstance(event, ClientJoined):
                if known or self._greets:  # whoever returns may bring something
                    self._orders.ask_for_uploads(client_id)
                if not known and self._greets:
                    self._inbox.expect(client_id)
                    continue
            else:
                self._inbox.forget(client_id)
            self._take(event)
        settings, here = self.parts.settings, len(self._roster.nodes)
        waited_s = now_s - self._roster.first_seen_s
        if not self.state.started and (
            here >= settings.start_clients or (here and waited_s >= settings.start_wait_s)
        ):
            self._take(RunStarted(now_s))

    def _read(self, reply: Reply, now_s: float) -> None:
        sent, client = reply.sent, self.status.client(reply.sent.client_id)
        client.task_id = client.base_version = None
        if reply.content is None:
            self._on_error(reply, now_s)
            return
        client.seen_s = now_s
        self._orders.answered(sent)
        events: Iterable[Event]
        if self._roster.is_member(sent.node_id, sent.client_id):
            events, more = self._inbox.read(sent, reply.content, self.state, now_s)
            if more:
                self._orders.ask_for_uploads(sent.client_id)
        else:
            events = [self._inbox.shut_out(sent, now_s)]
        for event in events:
            self._take(event)
        if self._inbox.expects(sent.client_id):
            self._orders.unanswered(sent.client_id, now_s)
            self._orders.ask_for_uploads(sent.client_id)
        if (task := self._in_flight(sent)) is not None:
            self._fail(task, "the device answered without the upload it was asked for", now_s)

    def _on_error(self, reply: Reply, now_s: float) -> None:
        sent, words = reply.sent, f"Flower error {reply.code}: {reply.words}"[:500]
        task = self._in_flight(sent)
        if task is None:
            self._orders.unanswered(sent.client_id, now_s)
            self._orders.ask_for_uploads(sent.client_id)
        elif reply.code in _RAISED or not self._orders.lost(task, words, now_s):
            self._fail(task, words, now_s)

    def _fail(self, task: Task, words: str, now_s: float) -> None:
        client = self.status.client(task.client_id)
        client.failures += 1
        client.last_error, client.last_error_s = words, now_s
        self._take(TaskFailed(now_s, task.task_id, task.client_id, words))
        self._orders.ask_for_uploads(task.client_id)

    def _in_flight(self, sent: Sent) -> Task | None:
        """Return the task of a message, if the coordinator still waits for it."""
        task = None if sent.task_id is None else self.state.tasks.get(sent.task_id)
        return task if task is not None and task.client_id == sent.client_id else None

    def _take_scores(self, now_s: float) -> None:
        while self._scoring is not None and (scored := self._scoring.fetch()) is not None:
            found = scored.evaluation
            self.status.loss, self.status.score = found.loss, found.score
            self._take(EvaluationFinished(now_s, scored.version, found.loss, found.score))

    # --- what goes out --------------------------------------------------------------------

    def _score(self, now_s: float) -> None:
        waiting, self._to_score = self._to_score, []
        if self._scoring is None:
            return
        for instruction in waiting:
            passed_over = self._scoring.ask(instruction)
            if passed_over is not None:
                self.parts.log.record_note(now_s, PASSED_OVER_NOTE, {"version": passed_over})
                self._unsynced = True

    def _send(self, now_s: float) -> bool:
        """Send what is due; return whether the run is over and everything is in."""
        if self.state.stopped is None:
            for task in self._orders.send(self.state, now_s):
                words = "Flower did not take the message"
                if not self._orders.lost(task, words, now_s):
                    self._fail(task, words, now_s)
            return False
        if math.isinf(self._closing_until_s):
            self._closing_until_s = now_s + self.parts.settings.closing_s
        closed = self._orders.close(self.state, now_s) or now_s >= self._closing_until_s
        scored = self._scoring is None or not self._scoring.pending
        over = closed and scored and not self._to_score
        if over:
            self._give_up(now_s)
        return over

    def _give_up(self, now_s: float) -> None:
        """Record what has become of the tasks nobody will answer any more."""
        for task in list(self.state.tasks.values()):
            words = f"the run ended, and {self._orders.why_unanswered(task, now_s)}"
            self._take(TaskFailed(now_s, task.task_id, task.client_id, words))
        self._sync()

    def _update_status(self, now_s: float) -> None:
        status, state = self.status, self.state
        status.time_s = now_s
        status.version = state.version
        status.received, status.accepted = state.received, state.accepted
        status.rejections = {str(reason): n for reason, n in state.rejections.items()}
        status.in_flight, status.buffered = len(state.tasks), len(state.buffer)
        status.evaluating = 0 if self._scoring is None else self._scoring.pending
        status.stopped = None if state.stopped is None else str(state.stopped)


__all__ = [
    "PASSED_OVER_NOTE",
    "TRAFFIC_NOTE",
    "Driver",
    "DriverParts",
    "DriverSettings",
    "Recovery",
]

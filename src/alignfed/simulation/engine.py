"""Drives the coordinator on a virtual clock: exact in order, and free to compute ahead.

What a client will compute is fixed when it is dispatched. So a result is only computed when the
clock reaches its arrival, and then together with others already under way (``lookahead.py``).
Nothing here reads the real time; the server's own time is modelled from the sizes of its work.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from alignfed.core.adapter import Adapter
from alignfed.core.coordinator import Coordinator
from alignfed.core.events import (
    ClientJoined,
    ClientLeft,
    EvaluationFinished,
    Event,
    RunStarted,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from alignfed.core.instructions import (
    Dispatch,
    Evaluate,
    Instruction,
    Publish,
    Reject,
    SetTimer,
    Stop,
)
from alignfed.core.ports import ClientTrainer, Evaluation, Journal
from alignfed.core.update import Task, Update
from alignfed.simulation.clock import VirtualClock
from alignfed.simulation.cost import ServerProfile, task_cost
from alignfed.simulation.fleet import Fleet
from alignfed.simulation.lookahead import Lookahead
from alignfed.simulation.state import (
    AvailabilityChanged,
    ClockEvent,
    EngineState,
    RunningTask,
    TaskLost,
    UploadDue,
)

REFUSAL_WEIGHT = 100
DISPATCH_WEIGHT = 10
"""Events that a refused upload (its training may have been computed) and a dispatch count as."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of.

    Attributes:
        coordinator: decides.
        trainer: computes clients' results.
        fleet: tells how long devices take.
        server: tells how long the server takes.
        clients: client ids, in the order in which they first report; each is a device id too.
        evaluate: scores a version on the common evaluation set; None scores nothing.
        evaluate_own: scores each client's own adapter on its own data instead, where clients keep
            a part of theirs.
        journal: keeps the record; None keeps none.
        cohort_size: how many tasks to compute together at most; which they were is recorded if it
            is above 1.
        lookahead: how many tasks a trainer that computes in the background may hold at most,
            results not yet due included; at least ``cohort_size``.
        calibration_flops_per_token: forward FLOPs of one calibration token on the server.
        most_idle_events: so many events without progress are a standstill, a dispatch counting
            as ten and a refused upload as a hundred; so many more for every further hundred
            clients.
    """

    coordinator: Coordinator
    trainer: ClientTrainer
    fleet: Fleet
    server: ServerProfile
    clients: Sequence[int]
    evaluate: Callable[[Adapter], Evaluation] | None = None
    evaluate_own: Callable[[Mapping[int, Adapter]], Evaluation] | None = None
    journal: Journal | None = None
    cohort_size: int = 1
    lookahead: int = 1
    calibration_flops_per_token: float = 0.0
    most_idle_events: int = 100_000

    @property
    def idle_limit(self) -> int:
        """Events without progress after which a run has come to a standstill."""
        return self.most_idle_events * max(1, len(self.clients) // 100)


class Engine:
    """A running simulation. ``step`` until it returns False, or ``run``."""

    def __init__(self, parts: EngineParts, adapter: Adapter) -> None:
        """Set up virtual time zero with ``adapter`` as version 0."""
        self._parts = parts
        self._state = EngineState(parts.coordinator.initial_state(adapter))
        self._clock: VirtualClock[ClockEvent, UploadDue] = VirtualClock()
        self._begun = False
        self._prepare()

    @classmethod
    def restore(cls, parts: EngineParts, state: EngineState) -> Engine:
        """Continue from a state that ``snapshot`` returned."""
        engine = cls.__new__(cls)
        engine._parts = parts
        engine._state = state
        engine._clock = VirtualClock.restore(
            state.now_s, state.sequence, state.pending, lambda event: isinstance(event, UploadDue)
        )
        engine._begun = state.coordinator.started
        engine._prepare()
        return engine

    def _prepare(self) -> None:
        """Set up what lasts no longer than a step, and what the parts fix for the whole run."""
        self._to_handle: deque[Event] = deque()
        parts, stop = self._parts, self._parts.coordinator.settings.stop
        self._exchange = parts.coordinator.exchange
        self._idle_limit = parts.idle_limit
        self._lookahead = Lookahead(
            self._clock,
            parts.trainer,
            stop,
            parts.journal,
            cohort_size=parts.cohort_size,
            held=parts.lookahead,
            measures=parts.coordinator.exchange.whole,
            computed=[
                task_id
                for task_id, running in self._state.running.items()
                if running.result is not None
            ],
        )
        # Accepted uploads bring the run nearer to its end, or answers where those do.
        self._progress = attrgetter("accepted" if math.isinf(stop.max_uploads) else "received")
        self._reached = self._progress(self._state.coordinator)

    def snapshot(self) -> EngineState:
        """Return the complete state, to be written down before the next step.

        Waits for what is being computed: a state holds results, never promises.
        """
        for running in self._state.running.values():
            self._lookahead.collect(running)
        self._state.pending = self._clock.pending()
        self._state.sequence = self._clock.sequence
        return self._state

    @property
    def state(self) -> EngineState:
        """The state as it is; read only. ``pending`` is current in ``snapshot`` alone."""
        return self._state

    @property
    def finished(self) -> bool:
        """Whether the coordinator has stopped the run."""
        return self._state.coordinator.stopped is not None

    def run(self) -> EngineState:
        """Step until the run ends."""
        while self.step():
            pass
        return self._state

    def step(self) -> bool:
        """Handle the next event on the clock; return whether the run goes on.

        A run that comes to a standstill ends here too; ``finished`` then stays False. Either its
        clock runs empty (every client gone for good), or timers and availability keep it full
        while nothing brings the run nearer to its end (``EngineParts.idle_limit``).
        """
        state = self._state
        if state.coordinator.stopped is not None or state.idle_events > self._idle_limit:
            return False
        if not self._begun:
            self._begin()
            return not self.finished
        try:
            state.now_s, event = self._clock.pop()
        except IndexError:
            return False
        _ON_CLOCK[type(event)](self, event)
        return state.coordinator.stopped is None

    def _note_idle(self, item: Event | Instruction | TaskLost) -> None:
        """Count something that brought the run no nearer to its end."""
        kind, weight = _kind_and_weight(item)
        if weight:
            self._state.idle[kind] += 1
            self._state.idle_events += weight

    # --- what happens on the clock --------------------------------------------------------

    def _begin(self) -> None:
        self._begun = True
        conditions = self._parts.fleet.conditions
        for client_id in self._parts.clients:
            if conditions.available(client_id, 0.0):
                self._handle(ClientJoined(0.0, client_id, self._step_s(client_id)))
            self._schedule_availability(client_id, 0.0)
        self._handle(RunStarted(0.0))

    def _on_upload_due(self, due: UploadDue) -> None:
        state, task_id = self._state, due.task_id
        running = state.running.get(task_id)
        if running is None:
            return
        distance = self._lookahead.compute(running, state)
        result, task = running.result, running.task
        assert result is not None
        client_id = task.client_id
        del state.running[task_id], state.on_device[client_id]
        exchange = self._exchange
        upload = exchange.upload(result.adapter)
        if exchange.keeps and (kept := exchange.kept(result.adapter)) is not None:
            state.kept[client_id] = kept
        state.uploaded_bytes += upload.layout.size_bytes
        state.trained_tokens += running.tokens
        update = Update(
            task_id, client_id, task.base_version, upload, result.num_examples, result.metrics
        )
        self._handle(UpdateArrived(self._server_time(), update, distance))

    def _on_timer_fired(self, timer: TimerFired) -> None:
        self._handle(TimerFired(self._server_time()))

    def _on_task_lost(self, lost: TaskLost) -> None:
        running = self._state.running.get(lost.task_id)
        if running is None:
            return
        self._release(running)
        self._state.lost_tasks += 1
        self._note_idle(lost)
        if lost.reported:
            task = running.task
            self._handle(TaskFailed(self._server_time(), task.task_id, task.client_id, lost.reason))

    def _on_availability_changed(self, change: AvailabilityChanged) -> None:
        now_s, device_id = self._state.now_s, change.device_id
        self._schedule_availability(device_id, now_s)
        if self._parts.fleet.conditions.available(device_id, now_s):
            step_s = self._step_s(device_id)
            self._handle(ClientJoined(self._server_time(), device_id, step_s))
        else:
            self._handle(ClientLeft(self._server_time(), device_id))

    def _schedule_availability(self, device_id: int, now_s: float) -> None:
        change_s = self._parts.fleet.conditions.next_change_s(device_id, now_s)
        if change_s < math.inf:
            self._clock.schedule(change_s, AvailabilityChanged(device_id))

    def _step_s(self, client_id: int) -> float | None:
        """Return what a device that comes up measures of its speed, where somebody asks.

        It tries a step while it loads its model; neither is charged to the clock.
        """
        by_speed, parts = self._parts.coordinator.settings.local_steps, self._parts
        if by_speed is None:
            return None
        work = parts.trainer.work(Task(0, client_id, 0, 0, steps=by_speed.steps))
        flops = work.tokens * work.flops_per_token / by_speed.steps
        return flops * parts.fleet.devices.seconds_per_flop[client_id]

    # --- the coordinator and its instructions ---------------------------------------------

    def _server_time(self) -> float:
        """When the server gets to something that happens now: at once, unless it is busy."""
        now_s, free_s = self._state.now_s, self._state.server_free_s
        return now_s if now_s > free_s else free_s

    def _handle(self, event: Event) -> None:
        state, parts = self._state, self._parts
        while True:
            coordinator, instructions = parts.coordinator.handle(state.coordinator, event)
            state.coordinator = coordinator
            if parts.journal is not None:
                parts.journal.record(event, instructions)
            reached = self._progress(coordinator)
            if reached == self._reached:
                for item in (event, *instructions):
                    self._note_idle(item)
            elif state.idle_events:
                state.idle.clear()
                state.idle_events = 0
            self._reached = reached
            for instruction in instructions:
                _CARRY_OUT[type(instruction)](self, instruction, event.time_s)
            if not self._to_handle:
                return
            event = self._to_handle.popleft()

    def _set_timer(self, timer: SetTimer, time_s: float) -> None:
        at_s = max(timer.at_s, self._state.now_s)
        self._clock.schedule(at_s, TimerFired(at_s))

    def _record_only(self, instruction: Reject | Stop, time_s: float) -> None:
        """Nothing in the simulation follows from these."""

    def _charge(self, publish: Publish, time_s: float) -> None:
        flops = publish.work.calibration_tokens * self._parts.calibration_flops_per_token
        busy_s = self._parts.server.server_time_s(publish.work.bytes_moved, flops)
        self._state.server_busy_s += busy_s
        self._state.server_free_s = max(time_s, self._state.server_free_s) + busy_s

    def _evaluate(self, instruction: Evaluate, time_s: float) -> None:
        parts = self._parts
        if parts.evaluate_own is not None:
            found = parts.evaluate_own(own_adapters(parts, self._state, instruction.adapter))
        elif parts.evaluate is not None:
            found = parts.evaluate(instruction.adapter)
        else:
            return
        self._to_handle.append(
            EvaluationFinished(time_s, instruction.version, found.loss, found.score)
        )

    def _start(self, dispatch: Dispatch, time_s: float) -> None:
        state, parts, exchange = self._state, self._parts, self._exchange
        task, start = dispatch.task, dispatch.adapter
        task_id, client_id = task.task_id, task.client_id
        if client_id in state.on_device:
            self._abandon(client_id)
        work = parts.trainer.work(task)
        down_bytes, up_bytes = exchange.transfer_bytes(start.layout, task.dispatch)
        cost = task_cost(work.tokens, work.flops_per_token, down_bytes, up_bytes)
        start_s = time_s if time_s > state.server_free_s else state.server_free_s
        times = parts.fleet.task_times(client_id, start_s, cost)
        state.downloaded_bytes += down_bytes
        state.on_device[client_id] = task_id
        if times.lost_at_s is None:
            arrival_s = times.finished_s
            self._clock.expect(arrival_s, UploadDue(task_id))
        else:
            arrival_s = math.inf
            reason = str(times.lost_reason)
            reported = reason != "failure"
            self._clock.schedule(times.lost_at_s, TaskLost(task_id, reason, reported))
        if exchange.keeps:
            start = exchange.rejoin(start, state.kept.get(client_id))
        state.running[task_id] = RunningTask(task, start, arrival_s, work.tokens)

    def _abandon(self, device_id: int) -> None:
        """A device that is given new work drops what the server no longer waits for."""
        self._release(self._state.running[self._state.on_device[device_id]])
        self._state.lost_tasks += 1

    def _release(self, running: RunningTask) -> None:
        state, task = self._state, running.task
        self._lookahead.forget(task.task_id)
        del state.running[task.task_id]
        del state.on_device[task.client_id]


def _kind_and_weight(item: Event | Instruction | TaskLost) -> tuple[str, int]:
    """Return what an idle run's report calls an item, and the events it counts as."""
    if isinstance(item, Reject):
        return item.reason.value, REFUSAL_WEIGHT
    if isinstance(item, TaskLost):
        return f"task lost: {item.reason}", 1
    return type(item).__name__, _IDLE_WEIGHTS.get(type(item), 1)


def own_adapters(parts: EngineParts, state: EngineState, adapter: Adapter) -> Mapping[int, Adapter]:
    """Return each client's adapter: the server's, with what the client keeps in its place."""
    rejoin = parts.coordinator.exchange.rejoin
    return {client_id: rejoin(adapter, state.kept.get(client_id)) for client_id in parts.clients}


# What the server does itself counts for nothing.
_IDLE_WEIGHTS: Mapping[type, int] = {
    Dispatch: DISPATCH_WEIGHT,
    **dict.fromkeys((Publish, Evaluate, SetTimer, Stop, EvaluationFinished), 0),
}
_ON_CLOCK: Mapping[type, Callable[[Engine, Any], None]] = {
    UploadDue: Engine._on_upload_due,
    TaskLost: Engine._on_task_lost,
    AvailabilityChanged: Engine._on_availability_changed,
    TimerFired: Engine._on_timer_fired,
}
_CARRY_OUT: Mapping[type, Callable[[Engine, Any, float], None]] = {
    Dispatch: Engine._start,
    SetTimer: Engine._set_timer,
    Publish: Engine._charge,
    Evaluate: Engine._evaluate,
    Reject: Engine._record_only,
    Stop: Engine._record_only,
}

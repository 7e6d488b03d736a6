"""The asynchronous coordinator: events in, instructions out.

Nothing here reads a clock, a socket, a file or a random source: time comes with each event, and
what a client computes comes with its upload. The same coordinator runs on a virtual clock and
behind real devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from alignfed.core import admission, tasks
from alignfed.core.adapter import Adapter, with_layout
from alignfed.core.events import (
    ClientJoined,
    ClientLeft,
    EvaluationFinished,
    Event,
    RunStarted,
    TaskFailed,
    TimerFired,
    UpdateArrived,
    UploadRefused,
)
from alignfed.core.instructions import (
    AppliedUpload,
    Evaluate,
    Instruction,
    Publish,
    Reject,
    SetTimer,
    Stop,
    StopReason,
)
from alignfed.core.judging import judge
from alignfed.core.lora.exchange import WHOLE, Exchange
from alignfed.core.ports import (
    AggregationRule,
    BufferedUpdate,
    Calibrator,
    Flush,
    LoraRule,
    Scheduler,
    Step,
    WorkAhead,
    ahead_of,
    scheduler_of,
)
from alignfed.core.state import CoordinatorSettings, CoordinatorState, Snapshot
from alignfed.core.update import Update
from alignfed.errors import CoordinatorError


@dataclass(frozen=True, slots=True)
class Coordinator:
    """The rules of a run; what changes lives in ``CoordinatorState``.

    Attributes:
        settings: concurrency, buffer, timeouts, stop conditions.
        rule: turns a buffer of uploads into a server step.
        lora: how LoRA factors combine.
        calibrator: the server's calibration mini-batch, if it holds one.
        exchange: what of an adapter travels, and at which rank.
        put_by: returns an accepted upload as it is to wait, for example mapped from disk; None
            leaves it as it came.
        scheduler: the rule's, if it has one.
        ahead: what the rule does on an upload's arrival, if it does anything.
        synchronous: whether the rule works in rounds.
    """

    settings: CoordinatorSettings
    rule: AggregationRule
    lora: LoraRule
    calibrator: Calibrator | None = None
    exchange: Exchange = WHOLE
    put_by: Callable[[Adapter], Adapter] | None = None
    scheduler: Scheduler | None = field(init=False)
    ahead: WorkAhead | None = field(init=False)
    synchronous: bool = field(init=False)

    def __post_init__(self) -> None:
        """Look up once, not with every event, what not every rule has."""
        object.__setattr__(self, "scheduler", scheduler_of(self.rule))
        object.__setattr__(self, "ahead", ahead_of(self.rule))
        object.__setattr__(self, "synchronous", self.rule.synchronous)

    def initial_state(self, adapter: Adapter) -> CoordinatorState:
        """Return the state before the first event, with ``adapter`` as version 0."""
        return CoordinatorState(
            adapter=adapter,
            rule_state=self.rule.init(adapter),
            norms=admission.NormHistory(self.settings.max_norm_ratio),
            snapshots={0: Snapshot(adapter)},
            schedule=None if self.scheduler is None else self.scheduler.begin(),
        )

    def handle(
        self, state: CoordinatorState, event: Event
    ) -> tuple[CoordinatorState, list[Instruction]]:
        """Take one event in and return the state and the instructions it leads to.

        The state belongs to the coordinator and may be changed in place.

        Raises:
            CoordinatorError: the event is of a kind the coordinator does not know.
        """
        handler = _HANDLERS.get(type(event))
        if handler is None:
            raise CoordinatorError(f"unknown event {type(event).__name__}", event=event)
        out: list[Instruction] = []
        handler(self, state, event, out)
        if state.started and state.stopped is None:
            self._give_work(state, event.time_s, out)
            self._set_timer(state, out)
        return state, out

    # --- events ---------------------------------------------------------------------------

    def _on_run_started(
        self, state: CoordinatorState, event: RunStarted, out: list[Instruction]
    ) -> None:
        if state.started:
            raise CoordinatorError("the run has already started", time_s=event.time_s)
        state.started = True
        self._evaluate(state, out)

    def _on_client_joined(
        self, state: CoordinatorState, event: ClientJoined, out: list[Instruction]
    ) -> None:
        tasks.join(state, event.client_id)
        if self.settings.local_steps is not None:
            self.settings.local_steps.learn(state.speeds, event.client_id, event.step_s)

    def _on_client_left(
        self, state: CoordinatorState, event: ClientLeft, out: list[Instruction]
    ) -> None:
        tasks.leave(state, event.client_id)

    def _on_update_arrived(
        self, state: CoordinatorState, event: UpdateArrived, out: list[Instruction]
    ) -> None:
        update, now_s = event.update, event.time_s
        task = state.tasks.get(update.task_id)
        judged = judge(state, self.exchange, event, task)
        if task is not None and task.client_id == update.client_id:
            state.received += 1
            if "tokens" in update.metrics:
                state.tokens += update.reported_tokens
            if (by_speed := self.settings.local_steps) is not None:
                by_speed.learn(state.speeds, update.client_id, update.metrics.get("step_s"))
        else:  # it answers nothing, so that it was refused
            task = None
        if isinstance(judged, admission.Rejection):
            if task is not None:
                tasks.fail(state, self.settings, task, now_s)
            state.rejections[judged.reason] += 1
            out.append(Reject(update.task_id, update.client_id, judged.reason, judged.detail))
        else:
            assert task is not None
            tasks.finish(state, task)
            adapter, base, update_norm = judged
            state.norms.add(update_norm / (task.steps or 1))
            self._buffer(state, update, adapter, base, update_norm, now_s)
        self._after_answer(state, now_s, out)

    def _on_upload_refused(
        self, state: CoordinatorState, event: UploadRefused, out: list[Instruction]
    ) -> None:
        task = state.tasks.get(event.task_id)
        if task is not None and task.client_id == event.client_id:
            state.received += state.stopped is None
            tasks.fail(state, self.settings, task, event.time_s)
        state.rejections[event.reason] += 1
        out.append(Reject(event.task_id, event.client_id, event.reason, event.detail))
        self._after_answer(state, event.time_s, out)

    def _after_answer(self, state: CoordinatorState, now_s: float, out: list[Instruction]) -> None:
        if state.stopped is not None:
            return
        self._flush_if_complete(state, now_s, out)
        if state.stopped is None:
            stop = self.settings.stop
            if state.received >= stop.max_uploads:
                self._stop(state, now_s, StopReason.MAX_UPLOADS, out)
            elif state.tokens >= stop.max_tokens:
                self._stop(state, now_s, StopReason.MAX_TOKENS, out)

    def _on_task_failed(
        self, state: CoordinatorState, event: TaskFailed, out: list[Instruction]
    ) -> None:
        task = state.tasks.get(event.task_id)
        if task is None or task.client_id != event.client_id:
            return
        # An upload that comes after all is late; nobody has answered the task.
        tasks.expire(state, self.settings, task, event.time_s)
        if state.stopped is None:
            self._flush_if_complete(state, event.time_s, out)

    def _on_timer_fired(
        self, state: CoordinatorState, event: TimerFired, out: list[Instruction]
    ) -> None:
        now_s = event.time_s
        if now_s >= state.wake_at_s:
            state.wake_at_s = math.inf
        if state.stopped is not None:
            return
        tasks.expire_due(state, self.settings, now_s)
        tasks.end_pauses(state, now_s)
        if state.flush_due_s <= now_s and self.scheduler is None:
            self._close_round(state, now_s)
            self._flush(state, now_s, out)
        else:
            self._flush_if_complete(state, now_s, out)
        if state.stopped is None and now_s >= self.settings.stop.max_time_s:
            self._stop(state, now_s, StopReason.MAX_TIME, out)

    def _on_evaluation_finished(
        self, state: CoordinatorState, event: EvaluationFinished, out: list[Instruction]
    ) -> None:
        stop = self.settings.stop
        if event.loss < state.best_loss - stop.min_improvement:
            state.best_loss = event.loss
            state.stale_evaluations = 0
        else:
            state.stale_evaluations += 1
        if state.stopped is not None:
            return
        # The version that was scored is the one to keep: nothing may be applied on top of it.
        if event.loss <= stop.target_loss:
            self._end(state, StopReason.TARGET_LOSS, out)
        elif state.stale_evaluations >= stop.patience:
            self._end(state, StopReason.PATIENCE, out)

    def _give_work(self, state: CoordinatorState, now_s: float, out: list[Instruction]) -> None:
        if self.synchronous and (state.tasks or state.buffer):
            return
        scheduler, exchange = self.scheduler, self.exchange
        given = tasks.hand_out(state, self.settings, exchange, scheduler, now_s, out)
        if given and self.synchronous:
            state.flush_due_s = now_s + self.settings.flush_timeout_s

    # --- uploads and versions -------------------------------------------------------------

    def _buffer(
        self,
        state: CoordinatorState,
        update: Update,
        adapter: Adapter,
        base: Adapter,
        update_norm: float,
        now_s: float,
    ) -> None:
        record = state.clients[update.client_id]
        uploads = record.uploads = record.uploads + 1
        state.accepted += 1
        if uploads == 1:
            state.participants += 1
        if not state.buffer and not self.synchronous:
            state.flush_due_s = now_s + self.settings.flush_timeout_s
        entry = BufferedUpdate(
            update.task_id,
            update.client_id,
            update.base_version,
            update.num_examples,
            update_norm,
            uploads,
            state.version - update.base_version,
            adapter.layout.size_bytes + base.layout.size_bytes,
        )
        state.buffer.append(entry)
        if self.put_by is not None:
            adapter = self.put_by(adapter)
        lora = self.lora
        gathered = state.gathered = self.rule.receive(state.gathered, entry, adapter, base, lora)
        if self.ahead is not None:
            self.ahead(gathered, state.adapter, lora, self.calibrator)

    def _flush_if_complete(
        self, state: CoordinatorState, now_s: float, out: list[Instruction]
    ) -> None:
        if self.synchronous:
            complete = not state.tasks
        elif self.scheduler is not None:
            accepted = {entry.task_id for entry in state.buffer}
            complete = self.scheduler.settle(state.schedule, state.tasks, accepted, now_s)
        else:
            complete = len(state.buffer) >= self.settings.buffer_size
        if complete:
            self._flush(state, now_s, out)

    def _close_round(self, state: CoordinatorState, now_s: float) -> None:
        if self.synchronous:
            for task in list(state.tasks.values()):
                tasks.expire(state, self.settings, task, now_s)

    def _flush(self, state: CoordinatorState, now_s: float, out: list[Instruction]) -> None:
        state.flush_due_s = math.inf
        if not state.buffer:
            return
        updates = tuple(state.buffer)
        flush = Flush(
            version=state.version,
            adapter=state.adapter,
            updates=updates,
            mean_uploads=state.accepted / state.participants,
            clients=len(state.clients),
            lora=self.lora,
            calibrator=self.calibrator,
        )
        gathered, state.gathered = state.gathered, None
        rule_state, step = self.rule.apply(state.rule_state, gathered, flush)
        if step.adapter.is_finite():
            state.rule_state = rule_state
        else:
            step = step.refused(state.adapter)
        state.buffer.clear()
        self._publish(state, step, updates, out)
        if state.version % self.settings.evaluate_every == 0:
            self._evaluate(state, out)
        if state.stopped is None and state.version >= self.settings.stop.max_versions:
            self._stop(state, now_s, StopReason.MAX_VERSIONS, out)

    def _publish(
        self,
        state: CoordinatorState,
        step: Step,
        updates: tuple[BufferedUpdate, ...],
        out: list[Instruction],
    ) -> None:
        if state.snapshots[state.version].references == 0:
            del state.snapshots[state.version]
        adapter = step.adapter
        if adapter.layout == state.adapter.layout:
            adapter = with_layout(adapter, state.adapter.layout)
        state.version += 1
        state.adapter = adapter
        state.snapshots[state.version] = Snapshot(adapter)
        cuts = step.cuts or (1.0,) * len(updates)
        applied = [
            AppliedUpload(e.task_id, e.client_id, e.base_version, e.staleness, weight, e.norm, cut)
            for e, weight, cut in zip(updates, step.weights, cuts, strict=True)
        ]
        out.append(Publish(state.version, adapter, tuple(applied), step.notes, step.work))

    # --- evaluation, timers, the end ------------------------------------------------------

    def _evaluate(self, state: CoordinatorState, out: list[Instruction]) -> None:
        if state.evaluated_version != state.version:
            state.evaluated_version = state.version
            out.append(Evaluate(state.version, state.adapter))

    def _set_timer(self, state: CoordinatorState, out: list[Instruction]) -> None:
        due_s, max_time_s = state.flush_due_s, self.settings.stop.max_time_s
        if max_time_s < due_s:
            due_s = max_time_s
        if state.deadlines or state.cooling:
            due_s = min(due_s, tasks.next_due_s(state))
        if due_s < state.wake_at_s:
            state.wake_at_s = due_s
            out.append(SetTimer(due_s))

    def _stop(
        self, state: CoordinatorState, now_s: float, reason: StopReason, out: list[Instruction]
    ) -> None:
        """End the run with every accepted upload applied."""
        state.stopped = reason
        self._flush(state, now_s, out)
        self._evaluate(state, out)
        self._end(state, reason, out)

    def _end(self, state: CoordinatorState, reason: StopReason, out: list[Instruction]) -> None:
        state.stopped = reason
        out.append(Stop(reason, state.version))


_HANDLERS: dict[type, Callable[[Coordinator, CoordinatorState, Any, list[Instruction]], None]] = {
    RunStarted: Coordinator._on_run_started,
    ClientJoined: Coordinator._on_client_joined,
    ClientLeft: Coordinator._on_client_left,
    UpdateArrived: Coordinator._on_update_arrived,
    UploadRefused: Coordinator._on_upload_refused,
    TaskFailed: Coordinator._on_task_failed,
    TimerFired: Coordinator._on_timer_fired,
    EvaluationFinished: Coordinator._on_evaluation_finished,
}

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignfed.core.adapter import Adapter
from alignfed.core.aggregation.fedavg import FedAvg
from alignfed.core.events import (
    ClientJoined,
    ClientLeft,
    EvaluationFinished,
    RunStarted,
    TaskFailed,
    TimerFired,
    UpdateArrived,
    UploadRefused,
)
from alignfed.core.instructions import (
    Dispatch,
    Evaluate,
    Publish,
    Reject,
    RejectReason,
    SetTimer,
    Stop,
    StopReason,
)
from alignfed.core.ports import Step
from alignfed.core.state import CoordinatorSettings, StopConditions, check_invariants
from alignfed.errors import CoordinatorError
from tests.core.coordinators import answer, dispatches, start


def of(kind, instructions):
    return [instruction for instruction in instructions if isinstance(instruction, kind)]


def test_work_is_given_up_to_the_concurrency_and_one_task_a_client():
    _, state, out = start(clients=5, concurrency=3, buffer_size=2)
    assert [task.client_id for task in dispatches(out)] == [0, 1, 2]
    assert len(of(Evaluate, out)) == 1
    assert len(state.tasks) == 3


def test_the_longest_idle_client_is_next():
    coordinator, state, out = start(clients=4, concurrency=2, buffer_size=9)
    first, second = dispatches(out)
    state, out = coordinator.handle(state, UpdateArrived(1.0, answer(state, second, 1)))
    assert [task.client_id for task in dispatches(out)] == [2]
    state, out = coordinator.handle(state, UpdateArrived(2.0, answer(state, first, 2)))
    assert [task.client_id for task in dispatches(out)] == [3]


def test_a_full_buffer_publishes_a_version_and_staleness_is_counted_at_the_flush():
    coordinator, state, out = start(clients=3, concurrency=3, buffer_size=1)
    tasks = dispatches(out)
    staleness = []
    for turn, task in enumerate(tasks):
        state, out = coordinator.handle(state, UpdateArrived(1.0 + turn, answer(state, task, turn)))
        (published,) = of(Publish, out)
        assert published.version == turn + 1
        staleness += [applied.staleness for applied in published.applied]
    assert staleness == [0, 1, 2]


def test_a_base_version_is_held_exactly_as_long_as_a_task_needs_it():
    coordinator, state, out = start(clients=2, concurrency=2, buffer_size=1)
    slow, fast = dispatches(out)
    for turn in range(4):
        state, out = coordinator.handle(state, UpdateArrived(1.0 + turn, answer(state, fast, turn)))
        (fast,) = dispatches(out)
        assert set(state.snapshots) == {0, state.version}
    state, out = coordinator.handle(state, UpdateArrived(9.0, answer(state, slow, 9)))
    assert set(state.snapshots) == {fast.base_version, state.version}


def test_a_partial_buffer_is_flushed_at_the_deadline_without_any_arrival():
    coordinator, state, out = start(clients=3, concurrency=3, buffer_size=3, flush_timeout_s=5.0)
    state, out = coordinator.handle(state, UpdateArrived(2.0, answer(state, dispatches(out)[0], 1)))
    assert [timer.at_s for timer in of(SetTimer, out)] == [7.0]
    state, out = coordinator.handle(state, TimerFired(7.0))
    (published,) = of(Publish, out)
    assert len(published.applied) == 1
    state, out = coordinator.handle(state, TimerFired(8.0))
    assert not of(Publish, out)


def test_a_synchronous_round_waits_for_everyone_and_late_clients_miss_it():
    coordinator, state, out = start(
        clients=4, concurrency=3, buffer_size=1, rule=FedAvg(), flush_timeout_s=10.0
    )
    first, second, third = dispatches(out)
    state, out = coordinator.handle(state, UpdateArrived(1.0, answer(state, first, 1)))
    assert not of(Publish, out) and not dispatches(out)
    state, out = coordinator.handle(state, UpdateArrived(2.0, answer(state, second, 2)))
    assert not of(Publish, out) and not dispatches(out)
    state, out = coordinator.handle(state, TimerFired(10.0))
    (published,) = of(Publish, out)
    assert [applied.client_id for applied in published.applied] == [0, 1]
    assert 3 in [task.client_id for task in dispatches(out)]
    state, out = coordinator.handle(
        state, UpdateArrived(11.0, replace(answer_from_zero(state, third)))
    )
    assert [reject.reason for reject in of(Reject, out)] == [RejectReason.TASK_EXPIRED]


def answer_from_zero(state, task):
    """An upload for a task whose base version may no longer be held."""
    from alignfed.core.update import Update

    return Update(task.task_id, task.client_id, task.base_version, state.adapter, 8)


def test_a_synchronous_round_ends_when_the_last_client_fails():
    coordinator, state, out = start(clients=2, concurrency=2, buffer_size=1, rule=FedAvg())
    first, second = dispatches(out)
    state, _ = coordinator.handle(state, UpdateArrived(1.0, answer(state, first, 1)))
    state, out = coordinator.handle(state, TaskFailed(2.0, second.task_id, 1, "crashed"))
    (published,) = of(Publish, out)
    assert [applied.client_id for applied in published.applied] == [0]


def test_a_refused_upload_ends_its_clients_task_and_counts_as_an_answer():
    coordinator, state, out = start(clients=1, concurrency=1, buffer_size=1, retry_backoff_s=2.0)
    (task,) = dispatches(out)
    refused = UploadRefused(1.0, task.task_id, 0, RejectReason.MALFORMED, "not safetensors")
    state, out = coordinator.handle(state, refused)
    check_invariants(state, coordinator.settings)
    assert of(Reject, out) == [Reject(task.task_id, 0, RejectReason.MALFORMED, "not safetensors")]
    assert state.received == 1 and not state.tasks and not dispatches(out)
    assert [timer.at_s for timer in of(SetTimer, out)] == [3.0]


def test_a_refused_upload_for_someone_elses_task_leaves_that_task_in_flight():
    coordinator, state, out = start(clients=2, concurrency=2, buffer_size=2)
    first, _ = dispatches(out)
    other = 1 - first.client_id
    refused = UploadRefused(1.0, first.task_id, other, RejectReason.WRONG_CLIENT, "")
    state, out = coordinator.handle(state, refused)
    assert len(of(Reject, out)) == 1
    assert first.task_id in state.tasks and state.received == 0


def test_an_upload_for_a_task_that_was_reported_failed_is_late_not_a_repetition():
    coordinator, state, out = start(clients=1, concurrency=1, buffer_size=1)
    (task,) = dispatches(out)
    update = answer(state, task, 1)
    state, _ = coordinator.handle(state, TaskFailed(1.0, task.task_id, 0, "node gone"))
    state, out = coordinator.handle(state, UpdateArrived(2.0, update))
    assert [refusal.reason for refusal in of(Reject, out)] == [RejectReason.TASK_EXPIRED]


def test_a_silent_client_is_given_up_and_comes_back_after_its_backoff():
    coordinator, state, out = start(
        clients=1, concurrency=1, buffer_size=1, task_timeout_s=4.0, retry_backoff_s=2.0
    )
    times = []
    for _ in range(3):
        (timer,) = of(SetTimer, out)
        state, out = coordinator.handle(state, TimerFired(timer.at_s))
        check_invariants(state, coordinator.settings)
        times += [timer.at_s] * bool(dispatches(out))
        while not dispatches(out):
            (timer,) = of(SetTimer, out)
            state, out = coordinator.handle(state, TimerFired(timer.at_s))
        times.append(timer.at_s)
    assert times == [6.0, 14.0, 26.0]  # 4 + 2, then + 4 + 4, then + 4 + 8


def test_a_client_that_left_gets_no_work_until_it_returns():
    coordinator, state, out = start(clients=2, concurrency=1, buffer_size=1, retry_backoff_s=0.0)
    (task,) = dispatches(out)
    state, _ = coordinator.handle(state, ClientLeft(1.0, 1))
    state, out = coordinator.handle(state, TaskFailed(2.0, task.task_id, 0, "crashed"))
    assert [task.client_id for task in dispatches(out)] == [0]
    state, _ = coordinator.handle(state, ClientLeft(3.0, 0))
    (again,) = dispatches(out)
    state, out = coordinator.handle(state, TaskFailed(4.0, again.task_id, 0, "crashed"))
    assert dispatches(out) == []
    state, out = coordinator.handle(state, ClientJoined(5.0, 1))
    assert [task.client_id for task in dispatches(out)] == [1]


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        (StopConditions(max_uploads=3), StopReason.MAX_UPLOADS),
        (StopConditions(max_versions=1), StopReason.MAX_VERSIONS),
        (StopConditions(max_time_s=2.5), StopReason.MAX_TIME),
    ],
)
def test_a_run_stops_with_every_accepted_upload_applied(stop, reason):
    coordinator, state, out = start(clients=4, concurrency=4, buffer_size=2, stop=stop)
    tasks = dispatches(out)
    timers = [timer.at_s for timer in of(SetTimer, out)]
    now_s = 0.0
    while not of(Stop, out):
        now_s += 1.0
        if timers and timers[0] <= now_s:
            state, out = coordinator.handle(state, TimerFired(timers.pop(0)))
        else:
            state, out = coordinator.handle(
                state, UpdateArrived(now_s, answer(state, tasks.pop(0), int(now_s)))
            )
            tasks += dispatches(out)
    assert of(Stop, out) == [Stop(reason, state.version)]
    assert not state.buffer
    assert state.evaluated_version == state.version
    state, out = coordinator.handle(state, UpdateArrived(99.0, answer(state, tasks.pop(0), 1)))
    assert [reject.reason for reject in out] == [RejectReason.RUN_STOPPED]


def test_target_loss_and_patience_stop_a_run_at_the_version_that_was_scored():
    stop = StopConditions(target_loss=1.0, patience=2, min_improvement=0.1)
    coordinator, state, _ = start(clients=1, concurrency=1, buffer_size=1, stop=stop)
    state, out = coordinator.handle(state, EvaluationFinished(1.0, 0, 0.9))
    assert of(Stop, out) == [Stop(StopReason.TARGET_LOSS, 0)]

    coordinator, state, _ = start(clients=1, concurrency=1, buffer_size=1, stop=stop)
    for loss in (3.0, 2.95, 2.91):
        state, out = coordinator.handle(state, EvaluationFinished(1.0, 0, loss))
    assert of(Stop, out) == [Stop(StopReason.PATIENCE, 0)]


class Diverging:
    """A rule whose step overflows."""

    name = "diverging"
    synchronous = False

    def init(self, adapter):
        return None

    def receive(self, gathered, entry, update, base, lora):
        return None

    def apply(self, state, gathered, flush):
        buffers = {d: torch.full_like(b, math.inf) for d, b in flush.adapter.buffers.items()}
        return state, Step(Adapter(flush.adapter.layout, buffers), (1.0,) * len(flush.updates))


def test_a_step_that_is_not_finite_leaves_the_model_as_it_is_and_says_so():
    coordinator, state, out = start(clients=1, concurrency=1, buffer_size=1, rule=Diverging())
    before = state.adapter.checksum
    state, out = coordinator.handle(state, UpdateArrived(1.0, answer(state, dispatches(out)[0], 1)))
    (published,) = of(Publish, out)
    assert published.notes["step_refused"] == 1.0
    assert [applied.weight for applied in published.applied] == [0.0]
    assert state.adapter.checksum == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 0},
        {"buffer_size": 0},
        {"evaluate_every": 0},
        {"flush_timeout_s": 0.0},
        {"task_timeout_s": -1.0},
        {"max_norm_ratio": math.nan},
        {"retry_backoff_s": -1.0},
        {"retry_backoff_s": 10.0, "max_backoff_s": 1.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(CoordinatorError):
        CoordinatorSettings(**{"concurrency": 2, "buffer_size": 2, **wrong})


def test_starting_twice_is_refused():
    coordinator, state, _ = start(clients=1, concurrency=1, buffer_size=1)
    with pytest.raises(CoordinatorError):
        coordinator.handle(state, RunStarted(0.0))


SCRIPTS = st.lists(
    st.tuples(
        st.sampled_from(["answer", "answer", "answer", "fail", "join", "leave", "wait", "repeat"]),
        st.integers(0, 7),
    ),
    max_size=60,
)


def play(script, rule=None):
    """Turn a script into events, play it, and return the instructions and the final state."""
    coordinator, state, out = start(
        clients=4,
        concurrency=3,
        buffer_size=2,
        rule=rule,
        flush_timeout_s=7.0,
        task_timeout_s=9.0,
        stop=StopConditions(max_uploads=20),
    )
    record, answered, now_s = list(out), [], 0.0
    for turn, (kind, number) in enumerate(script):
        now_s += 1.0
        tasks = sorted(state.tasks.values(), key=lambda task: task.task_id)
        if state.wake_at_s <= now_s:
            event = TimerFired(state.wake_at_s)
        elif kind == "answer" and tasks:
            answered.append(answer(state, tasks[number % len(tasks)], turn))
            event = UpdateArrived(now_s, answered[-1])
        elif kind == "repeat" and answered:
            event = UpdateArrived(now_s, answered[number % len(answered)])
        elif kind == "fail" and tasks:
            task = tasks[number % len(tasks)]
            event = TaskFailed(now_s, task.task_id, task.client_id, "crashed")
        elif kind == "leave":
            event = ClientLeft(now_s, number)
        else:
            event = ClientJoined(now_s, number)
        state, out = coordinator.handle(state, event)
        check_invariants(state, coordinator.settings)
        record += out
    return record, state


@settings(max_examples=60, deadline=None)
@given(SCRIPTS, st.booleans())
def test_any_script_keeps_the_invariants_and_plays_twice_to_the_same_bytes(script, synchronous):
    rule = FedAvg if synchronous else lambda: None
    first, state = play(script, rule())
    second, again = play(script, rule())
    assert state.adapter.checksum == again.adapter.checksum
    strip = lambda record: [  # noqa: E731
        (type(i).__name__, getattr(i, "version", None), i.task if isinstance(i, Dispatch) else None)
        for i in record
    ]
    assert strip(first) == strip(second)

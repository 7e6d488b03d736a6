from __future__ import annotations

import copy
import math
from collections import Counter

import pytest

from alignfed.core.aggregation import make_rule
from alignfed.core.coordinator import Coordinator
from alignfed.core.events import ClientLeft, TaskFailed, UpdateArrived
from alignfed.core.instructions import Dispatch, Publish, Reject, StopReason
from alignfed.core.lora import make_lora_rule
from alignfed.core.ports import Evaluation
from alignfed.core.state import CoordinatorSettings, StopConditions, check_invariants
from alignfed.simulation.cost import ServerProfile
from alignfed.simulation.engine import Engine, EngineParts
from alignfed.simulation.trace import read_trace, record_trace
from tests.core.adapters import make_adapter
from tests.simulation.fleets import make_fleet
from tests.simulation.trainers import NudgeTrainer

SPEEDS = [500.0, 50.0, 900.0, 20.0, 300.0, 310.0]


class Tape:
    """Keeps what is recorded, in memory."""

    def __init__(self):
        self.entries, self.cohorts = [], []

    def record(self, event, instructions):
        self.entries.append((event, tuple(instructions)))

    def record_cohort(self, time_s, task_ids):
        self.cohorts.append(tuple(task_ids))

    def events(self, kind):
        return [event for event, _ in self.entries if isinstance(event, kind)]

    def instructions(self, kind):
        return [i for _, more in self.entries for i in more if isinstance(i, kind)]

    def without_cohorts(self):
        return [
            (type(e).__name__, e.time_s, [type(i).__name__ for i in more])
            for e, more in self.entries
        ]


def make_engine(
    *,
    rule="fedbuff",
    stop=None,
    fleet=None,
    server=None,
    evaluate=None,
    cohort_size=1,
    **settings,
):
    tape, trainer = Tape(), NudgeTrainer()
    fleet = fleet or make_fleet(SPEEDS)
    settings = {"concurrency": 4, "buffer_size": 2, **settings}
    coordinator = Coordinator(
        CoordinatorSettings(**settings, stop=stop or StopConditions(max_uploads=30)),
        make_rule(rule),
        make_lora_rule("factor"),
    )
    parts = EngineParts(
        coordinator=coordinator,
        trainer=trainer,
        fleet=fleet,
        server=server or ServerProfile(1e12, 1e12),
        clients=range(len(fleet)),
        evaluate=evaluate,
        journal=tape,
        cohort_size=cohort_size,
    )
    return Engine(parts, make_adapter()), tape, trainer


def test_fast_devices_report_more_often_and_slow_ones_more_stale():
    engine, tape, _ = make_engine(stop=StopConditions(max_uploads=60))
    engine.run()
    uploads = Counter(event.update.client_id for event in tape.events(UpdateArrived))
    assert uploads[2] > uploads[3]
    applied = [upload for p in tape.instructions(Publish) for upload in p.applied]
    mean = {
        client: sum(u.staleness for u in applied if u.client_id == client) / uploads[client]
        for client in (2, 3)
    }
    assert mean[3] > mean[2]
    assert engine.state.coordinator.stopped == StopReason.MAX_UPLOADS


def test_an_upload_arrives_when_the_fleet_says():
    engine, tape, trainer = make_engine(stop=StopConditions(max_uploads=1), server=None)
    engine.run()
    size = make_adapter().size_bytes
    (first,) = tape.events(UpdateArrived)
    compute = [(trainer.tokens + i) * 10.0 / SPEEDS[i] for i in range(4)]
    assert first.time_s == pytest.approx(2 * size / 1e3 + min(compute))


@pytest.mark.parametrize("rule", ["fedbuff", "fedasync", "fedavg", "alignfed"])
@pytest.mark.parametrize("cohort_size", [2, 3, 100])
def test_computing_ahead_changes_nothing_but_what_is_computed_together(rule, cohort_size):
    buffer_size = 1 if rule == "fedasync" else 2
    variation = {"compute_sigma": 0.4, "mean_on_s": 60.0, "mean_off_s": 20.0, "slot_s": 5.0}
    runs = []
    for size in (1, cohort_size):
        engine, tape, trainer = make_engine(
            rule=rule,
            cohort_size=size,
            buffer_size=buffer_size,
            fleet=make_fleet(SPEEDS, **variation),
        )
        engine.run()
        runs.append((engine, tape, trainer))
    (alone, tape, _), (ahead, tape_ahead, trainer) = runs
    assert tape.without_cohorts() == tape_ahead.without_cohorts()
    assert alone.state.coordinator.adapter.checksum == ahead.state.coordinator.adapter.checksum
    assert max(len(cohort) for cohort in trainer.cohorts) > 1
    computed = [task_id for cohort in trainer.cohorts for task_id in cohort]
    assert len(computed) == len(set(computed))


@pytest.mark.parametrize(("uploads", "most"), [(1, 1), (2, 3), (30, 33)])
def test_lookahead_computes_little_that_cannot_be_used_before_the_upload_limit(uploads, most):
    engine, tape, trainer = make_engine(cohort_size=100, stop=StopConditions(max_uploads=uploads))
    engine.run()
    arrived = {event.update.task_id for event in tape.events(UpdateArrived)}
    computed = {task_id for cohort in trainer.cohorts for task_id in cohort}
    assert arrived <= computed
    assert len(computed) <= most


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    def play(seed):
        fleet = make_fleet(SPEEDS, seed=seed, compute_sigma=0.5, failures_per_hour=60.0)
        engine, tape, _ = make_engine(fleet=fleet, task_timeout_s=80.0)
        engine.run()
        return tape.without_cohorts(), engine.state.coordinator.adapter.checksum

    assert play(1) == play(1)
    assert play(1) != play(2)


@pytest.mark.parametrize("stopped_after", [0, 1, 5, 17, 40])
def test_a_restored_engine_ends_where_an_undisturbed_one_ends(stopped_after):
    variation = {
        "compute_sigma": 0.4,
        "mean_on_s": 60.0,
        "mean_off_s": 20.0,
        "failures_per_hour": 40.0,
    }

    def make():
        return make_engine(
            rule="alignfed",
            fleet=make_fleet(SPEEDS, **variation),
            task_timeout_s=90.0,
            cohort_size=3,
        )

    engine, tape, _ = make()
    engine.run()
    interrupted, first_tape, _ = make()
    for _ in range(stopped_after):
        interrupted.step()
    state = copy.deepcopy(interrupted.snapshot())
    _, second_tape, _ = fresh = make()
    restored = Engine.restore(fresh[0]._parts, state)
    restored.run()
    assert restored.state.coordinator.adapter.checksum == engine.state.coordinator.adapter.checksum
    both = first_tape.without_cohorts() + second_tape.without_cohorts()
    assert both == tape.without_cohorts()
    assert first_tape.cohorts + second_tape.cohorts == tape.cohorts


def test_devices_that_leave_lose_their_task_and_come_back():
    fleet = make_fleet(SPEEDS, mean_on_s=12.0, mean_off_s=10.0)
    engine, tape, _ = make_engine(fleet=fleet, stop=StopConditions(max_uploads=25))
    while engine.step():
        check_invariants(engine.state.coordinator, engine._parts.coordinator.settings)
    failures = tape.events(TaskFailed)
    assert failures and {f.reason for f in failures} == {"unavailable"}
    assert tape.events(ClientLeft)
    assert engine.state.lost_tasks >= len(failures)
    assert engine.finished


def test_tasks_that_vanish_are_given_up_and_the_run_goes_on():
    fleet = make_fleet(SPEEDS, failures_per_hour=150.0)
    engine, tape, _ = make_engine(fleet=fleet, task_timeout_s=60.0)
    while engine.step():
        check_invariants(engine.state.coordinator, engine._parts.coordinator.settings)
    assert not tape.events(TaskFailed)
    assert engine.state.coordinator.expired.ids
    assert engine.finished


def test_a_run_in_which_every_task_vanished_stands_still_and_says_so():
    engine, _, _ = make_engine(fleet=make_fleet(SPEEDS, failures_per_hour=1e5))
    engine.run()
    assert not engine.finished


def test_an_upload_for_a_task_given_up_is_refused_not_lost():
    fleet = make_fleet([100.0, 1.0])
    engine, tape, _ = make_engine(
        fleet=fleet,
        concurrency=2,
        buffer_size=1,
        task_timeout_s=100.0,
        retry_backoff_s=5000.0,
        max_backoff_s=5000.0,
        stop=StopConditions(max_time_s=1500.0),
    )
    engine.run()
    assert [reject.reason for reject in tape.instructions(Reject)] == ["task_expired"]


def test_the_servers_work_delays_the_next_dispatch():
    slow, fast = ServerProfile(100.0, 1.0), ServerProfile(1e15, 1e15)
    ends = []
    for server in (fast, slow):
        engine, _, _ = make_engine(server=server)
        ends.append(engine.run().now_s)
    assert ends[1] > ends[0]
    assert engine.state.server_busy_s > 1.0


def test_evaluations_reach_the_coordinator_and_can_stop_the_run():
    losses = iter([3.0, 2.0, 0.5, 0.4])
    stop = StopConditions(max_uploads=100, target_loss=1.0)
    engine, _, _ = make_engine(stop=stop, evaluate=lambda a: Evaluation(next(losses), None, 1))
    engine.run()
    assert engine.state.coordinator.stopped == StopReason.TARGET_LOSS
    assert engine.state.coordinator.version == 2
    assert engine.state.coordinator.best_loss == 0.5


def test_bytes_and_tokens_are_counted():
    engine, tape, _ = make_engine(stop=StopConditions(max_uploads=9))
    engine.run()
    size = make_adapter().size_bytes
    assert engine.state.uploaded_bytes == 9 * size
    assert engine.state.downloaded_bytes == len(tape.instructions(Dispatch)) * size
    arrived = [event.update.client_id for event in tape.events(UpdateArrived)]
    assert engine.state.trained_tokens == sum(100 + client_id for client_id in arrived)


def test_another_rule_meets_the_same_devices_on_a_replayed_trace(tmp_path):
    fleet = make_fleet(SPEEDS, seed=5, compute_sigma=0.6, slot_s=4.0, mean_on_s=80.0)
    path = tmp_path / "trace.jsonl"
    path.write_text(record_trace(fleet, 4000.0), encoding="utf-8")
    original, tape, _ = make_engine(fleet=fleet)
    original.run()
    again, tape_again, _ = make_engine(fleet=read_trace(path))
    again.run()
    assert tape.without_cohorts() == tape_again.without_cohorts()
    other, _, _ = make_engine(rule="fedavg", fleet=read_trace(path))
    assert math.isfinite(other.run().now_s)
    assert other.finished

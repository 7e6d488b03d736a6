"""A trainer that computes while the run goes on changes nothing but who waits for whom."""

import math
from dataclasses import replace

import pytest

from alignfed.core.events import UpdateArrived
from alignfed.core.state import StopConditions
from alignfed.simulation.engine import Engine
from tests.core.adapters import make_adapter
from tests.simulation.fleets import make_fleet
from tests.simulation.test_engine import SPEEDS, make_engine
from tests.simulation.trainers import NudgeTrainer

VARIATION = {"compute_sigma": 0.4, "mean_on_s": 60.0, "mean_off_s": 20.0, "slot_s": 5.0}


class Later:
    def __init__(self, trainer, jobs):
        self._trainer, self._jobs = trainer, jobs
        self.taken = False

    def results(self):
        self.taken = True
        return self._trainer.train(self._jobs)


class BackgroundNudge(NudgeTrainer):
    """Remembers what it was given, and computes when somebody asks."""

    def __init__(self):
        super().__init__()
        self.given = []

    def submit(self, jobs):
        later = Later(NudgeTrainer(), jobs)
        self.given.append(([job.task.task_id for job in jobs], later))
        return later


def in_background(cohort_size, lookahead, **settings):
    engine, tape, _ = make_engine(
        fleet=make_fleet(SPEEDS, **VARIATION), cohort_size=cohort_size, **settings
    )
    trainer = BackgroundNudge()
    parts = replace(engine._parts, trainer=trainer, lookahead=lookahead)
    return Engine(parts, make_adapter()), tape, trainer


@pytest.mark.parametrize("cohort_size", [1, 2, 3])
@pytest.mark.parametrize("lookahead", [1, 4, 100])
def test_the_run_is_that_of_a_trainer_that_is_waited_for(cohort_size, lookahead):
    alone, tape_alone, _ = make_engine(fleet=make_fleet(SPEEDS, **VARIATION))
    ahead, tape, trainer = in_background(cohort_size, lookahead)
    alone.run()
    ahead.run()
    assert tape.without_cohorts() == tape_alone.without_cohorts()
    assert alone.state.coordinator.adapter.checksum == ahead.state.coordinator.adapter.checksum
    given = [task_ids for task_ids, _ in trainer.given]
    # A task that is computed alone leaves no row of its cohort.
    recorded = [tuple(task_ids) for task_ids in given] if cohort_size > 1 else []
    assert tape.cohorts == recorded
    every = [task_id for task_ids in given for task_id in task_ids]
    assert len(every) == len(set(every))
    assert max(map(len, given)) <= cohort_size


@pytest.mark.parametrize("lookahead", [2, 3, 100])
def test_no_more_is_asked_for_than_the_lookahead_allows(lookahead):
    engine, _, _ = in_background(2, lookahead)
    most = 0
    while engine.step():
        # The one that has just arrived is no longer running.
        held = sum(engine._lookahead.asked_for(one) for one in engine.state.running.values())
        most = max(most, held + 1)
    assert 1 < most <= max(lookahead, 2)


@pytest.mark.parametrize("every", [1, 3, 10])
def test_who_trains_with_whom_does_not_depend_on_when_results_are_collected(every):
    undisturbed, tape, _ = in_background(2, 100)
    undisturbed.run()
    disturbed, other_tape, _ = in_background(2, 100)
    steps = 0
    while disturbed.step():
        steps += 1
        if steps % every == 0:
            state = disturbed.snapshot()
            assert disturbed._lookahead.outstanding == 0
            disturbed = Engine.restore(disturbed._parts, state)
    assert other_tape.cohorts == tape.cohorts
    assert other_tape.without_cohorts() == tape.without_cohorts()


def test_cohorts_are_begun_before_anybody_waits_for_them():
    engine, _, trainer = in_background(2, 100)
    begun_early = 0
    while engine.step():
        waiting = [later for _, later in trainer.given if not later.taken]
        begun_early = max(begun_early, len(waiting))
    assert begun_early >= 1


def test_little_is_computed_that_cannot_be_used_before_the_upload_limit():
    engine, tape, trainer = in_background(2, 100, stop=StopConditions(max_uploads=2))
    engine.run()
    arrived = {event.update.task_id for event in tape.events(UpdateArrived)}
    given = {task_id for task_ids, _ in trainer.given for task_id in task_ids}
    assert arrived <= given
    assert len(given) <= 3


@pytest.mark.parametrize("cohort_size", [1, 3])
@pytest.mark.parametrize("uploads", [3, 200])
def test_a_task_whose_upload_will_be_lost_is_never_computed(cohort_size, uploads):
    engine, _, trainer = in_background(cohort_size, 100, stop=StopConditions(max_uploads=uploads))
    lost = set()
    while engine.step():
        running = engine.state.running.values()
        lost |= {one.task.task_id for one in running if math.isinf(one.arrival_s)}
    computed = {task_id for task_ids, _ in trainer.given for task_id in task_ids}
    assert lost
    assert not lost & computed

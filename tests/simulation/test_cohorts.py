"""Tasks computed together: measured together too, and judged as each would be alone."""

import math
from dataclasses import replace

import pytest

from alignfed.core.adapter import Adapter
from alignfed.core.distance import distance
from alignfed.core.events import UpdateArrived
from alignfed.core.instructions import Dispatch, Publish, Reject
from alignfed.core.ports import TrainingResult
from alignfed.simulation.engine import Engine
from tests.core.adapters import make_adapter
from tests.simulation.test_engine import make_engine
from tests.simulation.trainers import NudgeTrainer


class Spoils(NudgeTrainer):
    """Answers some tasks with what no server may take."""

    def __init__(self, spoil):
        super().__init__()
        self._spoil = spoil

    def train(self, jobs):
        results = super().train(jobs)
        return [
            TrainingResult(self._spoil(one.adapter), 4, {"loss": 1.0})
            if job.task.task_id % 4 == 1
            else one
            for job, one in zip(jobs, results, strict=True)
        ]


def not_a_number(adapter):
    buffers = {dtype: buffer.clone() for dtype, buffer in adapter.buffers.items()}
    next(iter(buffers.values()))[3] = math.nan
    return Adapter(adapter.layout, buffers)


def too_far(adapter):
    return Adapter(adapter.layout, {t: 1e4 * one for t, one in adapter.buffers.items()})


def too_short(adapter):
    return Adapter(adapter.layout, {t: one[:-1] for t, one in adapter.buffers.items()})


def of_another_dtype(adapter):
    return Adapter(adapter.layout, {t: one.double() for t, one in adapter.buffers.items()})


def empty(adapter):
    return Adapter(adapter.layout, {})


def refusals(spoil, cohort_size):
    engine, tape, _ = make_engine(cohort_size=cohort_size, buffer_size=3)
    engine = Engine(replace(engine._parts, trainer=Spoils(spoil)), make_adapter())
    engine.run()
    assert engine.finished
    checksum = engine.state.coordinator.adapter.checksum
    return [(r.task_id, r.reason, r.detail) for r in tape.instructions(Reject)], checksum


@pytest.mark.parametrize("cohort_size", [2, 3, 100])
def test_what_a_cohort_was_measured_to_is_what_each_upload_measures(cohort_size):
    engine, tape, trainer = make_engine(cohort_size=cohort_size)
    engine.run()
    sent = {d.task.task_id: d.adapter for d in tape.instructions(Dispatch)}
    together = {task for cohort in trainer.cohorts if len(cohort) > 1 for task in cohort}
    measured = 0
    for event in tape.events(UpdateArrived):
        task_id = event.update.task_id
        assert (event.distance is not None) == (task_id in together)
        if event.distance is not None:
            assert event.distance == distance(event.update.adapter, sent[task_id]) > 0
            measured += 1
    assert measured > 5
    assert not engine._lookahead._distances.keys() - engine.state.running.keys()


@pytest.mark.parametrize("spoil", [not_a_number, too_far, too_short, of_another_dtype, empty])
def test_what_is_refused_alone_is_refused_in_a_cohort(spoil):
    alone, checksum = refusals(spoil, 1)
    together, other = refusals(spoil, 3)
    assert alone
    assert together == alone
    assert other == checksum


def test_a_restored_run_measures_again_and_finds_the_same():
    undisturbed, tape, _ = make_engine(cohort_size=3)
    undisturbed.run()
    disturbed, other, _ = make_engine(cohort_size=3)
    while disturbed.step():
        disturbed = Engine.restore(disturbed._parts, disturbed.snapshot())
    assert any(event.distance is None for event in other.events(UpdateArrived)[5:])
    assert other.cohorts == tape.cohorts
    published, again = tape.instructions(Publish), other.instructions(Publish)
    assert [p.applied for p in again] == [p.applied for p in published]
    assert [p.adapter.checksum for p in again] == [p.adapter.checksum for p in published]

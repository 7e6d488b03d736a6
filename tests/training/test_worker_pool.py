"""Processes side by side give one process's results, whoever dies on the way."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from alignfed.core.adapter import Adapter, LoraFactors
from alignfed.core.ports import TaskWork, TrainingJob, TrainingResult
from alignfed.core.update import Task
from alignfed.errors import ModelError
from alignfed.training.worker_pool import PoolTrainer, deal
from tests.training.samples import moved


def cost(task):
    return TaskWork(10 * (task.client_id + 1), 7.0)


def jobs(count):
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
    adapter = Adapter.pack({"q": LoraFactors(down, up, 4.0)})
    return [TrainingJob(Task(i, i % 3, 0, i // 3), adapter) for i in range(count)]


@dataclass(frozen=True)
class Mortal:
    """Nudges adapters; over task ``fatal`` its process is killed while ``lives`` holds files."""

    lives: Path
    fatal: int

    def __call__(self):
        return self

    def work(self, task):
        return cost(task)

    def train(self, jobs):
        results = []
        for job in jobs:
            if job.task.task_id == self.fatal and (left := sorted(self.lives.iterdir())):
                left[0].unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            results.append(TrainingResult(moved(job.adapter, job.task.task_id), 4, {"loss": 1.0}))
        return results


class Unbuildable:
    def __call__(self):
        raise ModelError("no such folder here", path="elsewhere")


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("shares", [1, 2, 3])
def test_every_job_is_dealt_once_in_order_and_evenly(count, shares):
    dealt = deal(count, shares)
    assert [place for share in dealt for place in share] == list(range(count))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert len(dealt) == min(count, shares)


def test_no_jobs_make_no_shares():
    assert deal(0, 2) == []


@pytest.mark.slow
def test_a_killed_worker_costs_no_result(tmp_path):
    lives = tmp_path / "lives"
    lives.mkdir()
    (lives / "one").touch()
    given = jobs(5)
    expected = Mortal(tmp_path, fatal=-1).train(given)
    pool = PoolTrainer(Mortal(lives, fatal=3), cost, 2)
    try:
        found = pool.train(given)
        assert not list(lives.iterdir())
        assert [r.adapter.checksum for r in found] == [r.adapter.checksum for r in expected]
        assert os.getpid() not in pool.process_ids()
        assert pool.work(given[1].task) == cost(given[1].task)
    finally:
        pool.close()


@pytest.mark.slow
def test_workers_that_always_die_end_in_an_error_that_says_what_to_lower(tmp_path):
    lives = tmp_path / "lives"
    lives.mkdir()
    for name in "abcdef":
        (lives / name).touch()
    pool = PoolTrainer(Mortal(lives, fatal=1), cost, 2)
    try:
        with pytest.raises(ModelError, match=r"died 3 times in a row.*training\.workers"):
            pool.train(jobs(2))
    finally:
        pool.close()


@pytest.mark.slow
def test_what_a_worker_raises_arrives_as_it_is():
    pool = PoolTrainer(Unbuildable(), cost, 1)
    try:
        with pytest.raises(ModelError, match="no such folder here"):
            pool.train(jobs(1))
    finally:
        pool.close()


@dataclass(frozen=True)
class Talkative:
    """Has something to say after every call."""

    def __call__(self):
        return self

    def work(self, task):
        return cost(task)

    def take_notes(self):
        return ("a cohort ran out of memory",)

    def train(self, jobs):
        return [TrainingResult(moved(job.adapter, job.task.task_id), 4, {}) for job in jobs]


@pytest.mark.slow
def test_what_a_worker_notes_is_said_once_and_results_may_be_taken_in_any_order():
    given = jobs(4)
    expected = Talkative().train(given)
    pool = PoolTrainer(Talkative(), cost, 2)
    try:
        first, second = pool.submit(given[:2]), pool.submit(given[2:])
        found = [*second.results(), *first.results()]
        order = [*expected[2:], *expected[:2]]
        assert [r.adapter.checksum for r in found] == [r.adapter.checksum for r in order]
        assert first.results() == first.results()
        assert pool.take_notes() == ("a cohort ran out of memory",)
        assert pool.take_notes() == ()
    finally:
        pool.close()


@pytest.mark.slow
def test_a_worker_killed_between_shares_costs_no_result():
    given = jobs(4)
    expected = Talkative().train(given)
    pool = PoolTrainer(Talkative(), cost, 2)
    try:
        pool.train(given)
        for process_id in pool.process_ids():
            os.kill(process_id, signal.SIGKILL)
        found = pool.train(given)
    finally:
        pool.close()
    assert [r.adapter.checksum for r in found] == [r.adapter.checksum for r in expected]

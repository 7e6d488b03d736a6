"""Cohorts on Ray's workers give one process's results, whoever dies on the way."""

import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from alignfed.core.adapter import Adapter, LoraFactors
from alignfed.core.ports import TaskWork, TrainingJob, TrainingResult
from alignfed.core.update import Task
from alignfed.errors import DataError, ModelError, RecipeError
from alignfed.training.encoding import Encoder
from alignfed.training.local import LocalTrainer
from alignfed.training.local_settings import LocalSettings
from alignfed.training.ray_cohorts import RaySettings, RayTrainer, WorkerLostError, deal
from alignfed.training.ray_worker import TrainerSetup, pack, unpack
from alignfed.training.settings import LoraSettings, ModelSettings
from tests.training.samples import TEMPLATE, federated, moved

# Ray leaves its own servers' processes and log files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

SETTINGS = LocalSettings(steps=3, batch_size=4, learning_rate=5e-3)
ROOT = Path(__file__).parents[2]


def cost(task):
    return TaskWork(10 * (task.client_id + 1), 7.0)


def small_adapter(seed=0):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
    return Adapter.pack({"q": LoraFactors(down, up, 4.0)})


def jobs_from(*adapters):
    return [
        TrainingJob(Task(i, client_id=i % 3, base_version=0, dispatch=i // 3), adapter)
        for i, adapter in enumerate(adapters)
    ]


@dataclass(frozen=True)
class Mortal:
    """Nudges adapters; over task ``fatal`` its process is killed, as often as lives are left.

    Each death takes a file out of ``lives``, so that the count outlasts the process.
    """

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
    """A worker's setup that cannot be honoured where the worker is."""

    def __call__(self):
        raise ModelError("no such folder here", path="elsewhere")


def mortal(folder, deaths, fatal):
    folder.mkdir()
    for i in range(deaths):
        (folder / str(i)).touch()
    return Mortal(folder, fatal)


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, with places for three workers."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install alignfed[ray]")
    before = os.environ.get("PYTHONPATH")
    # Workers unpickle by name what this file and the package define.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(
        num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000
    )
    yield ray
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def same(first, other):
    return first.layout == other.layout and all(
        torch.equal(buffer, other.buffers[dtype]) for dtype, buffer in first.buffers.items()
    )


def test_an_adapter_of_two_dtypes_travels_bit_for_bit():
    adapter = Adapter.pack(
        {"q": LoraFactors(torch.randn(2, 3).bfloat16(), torch.randn(5, 2).bfloat16(), 3.0)},
        {"head.weight": torch.randn(4, 2), "head.bias": torch.full((4,), float("nan"))},
    )
    back = unpack(pack(adapter))
    assert back.layout == adapter.layout
    assert back.checksum == adapter.checksum


def test_what_arrives_is_a_copy_that_nothing_else_can_change():
    adapter = small_adapter()
    packed = pack(adapter)
    back = unpack(packed)
    adapter.buffers[torch.float32].zero_()
    assert back.buffers[torch.float32].any()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 24])
@pytest.mark.parametrize("size", [None, 1, 4])
def test_every_job_is_in_one_cohort_in_order(count, size):
    cohorts = deal(count, RaySettings(num_workers=3, cohort_size=size))
    assert [place for cohort in cohorts for place in cohort] == list(range(count))
    assert all(len(cohort) > 0 for cohort in cohorts)
    lengths = [len(cohort) for cohort in cohorts]
    assert max(lengths, default=0) - min(lengths, default=0) <= 1
    if size is None:
        assert len(cohorts) == min(count, 3)
    else:
        assert max(lengths, default=0) <= size


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_workers": 0},
        {"num_cpus": -1},
        {"num_gpus": float("inf")},
        {"threads": 0},
        {"cohort_size": 0},
        {"max_retries": -1},
        {"start_timeout_s": 0},
    ],
)
def test_settings_outside_their_range_are_refused(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        RaySettings(**wrong)


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match=r"alignfed\[ray\]"):
        RayTrainer(Unbuildable(), cost)


@pytest.mark.slow
def test_workers_results_equal_one_processes_exactly(cluster, base, llama_folder):
    data = federated()
    setup = TrainerSetup(
        ModelSettings(str(llama_folder)),
        LoraSettings(rank=4, alpha=8.0),
        TEMPLATE,
        64,
        data.clients,
        SETTINGS,
        seed=3,
    )
    alone = LocalTrainer(base, Encoder(base, TEMPLATE, 64), data.clients, SETTINGS, 3)
    first, second = base.initial_adapter(), moved(base.initial_adapter(), 1)
    jobs = jobs_from(first, second, first, second, first)
    expected = alone.train(jobs)
    with RayTrainer(setup, alone.work, RaySettings(num_workers=2, cohort_size=2)) as trainer:
        assert trainer.work(jobs[0].task) == alone.work(jobs[0].task)
        found = trainer.train(jobs)
        before = trainer.process_ids()
        again = trainer.train(jobs[::-1])
        assert trainer.process_ids() == before
        assert len(set(before) | {os.getpid()}) == 3
        unknown = TrainingJob(Task(9, client_id=77, base_version=0, dispatch=0), first)
        with pytest.raises(DataError, match="client 77") as raised:
            trainer.train([unknown])
        assert raised.value.client_id == 77
        assert trainer.train([]) == []
    for results in (found, again[::-1]):
        for one, other in zip(results, expected, strict=True):
            assert same(one.adapter, other.adapter)
            assert not same(one.adapter, first)
            assert (one.num_examples, one.metrics) == (other.num_examples, other.metrics)


@pytest.mark.slow
def test_a_worker_killed_mid_cohort_costs_time_and_not_the_run(cluster, tmp_path):
    jobs = jobs_from(*[small_adapter()] * 6)
    expected = Mortal(tmp_path / "none", fatal=-1).train(jobs)
    dying = mortal(tmp_path / "lives", deaths=2, fatal=1)
    with RayTrainer(dying, cost, RaySettings(num_workers=2, max_retries=2)) as trainer:
        before = trainer.process_ids()
        found = trainer.train(jobs)
        assert list(dying.lives.iterdir()) == []
        assert len(set(before) & set(trainer.process_ids())) == 1
    assert all(same(one.adapter, other.adapter) for one, other in zip(found, expected, strict=True))


@pytest.mark.slow
def test_a_cohort_that_kills_every_worker_ends_in_a_clear_error(cluster, tmp_path):
    dying = mortal(tmp_path / "lives", deaths=9, fatal=3)
    with (
        RayTrainer(dying, cost, RaySettings(num_workers=2, max_retries=1)) as trainer,
        pytest.raises(WorkerLostError, match=r"died 2 times .* task 3") as raised,
    ):
        trainer.train(jobs_from(*[small_adapter()] * 6))
    assert raised.value.task_ids == [3, 4, 5]
    assert len(list(dying.lives.iterdir())) == 7


@pytest.mark.slow
def test_a_worker_killed_between_cohorts_is_replaced(cluster, tmp_path):
    jobs = jobs_from(*[small_adapter()] * 4)
    with RayTrainer(
        mortal(tmp_path / "lives", deaths=0, fatal=-1), cost, RaySettings(num_workers=2)
    ) as trainer:
        expected = trainer.train(jobs)
        for process_id in trainer.process_ids():
            os.kill(process_id, signal.SIGKILL)
        found = trainer.train(jobs)
    assert all(same(one.adapter, other.adapter) for one, other in zip(found, expected, strict=True))


@pytest.mark.slow
def test_a_worker_that_cannot_build_its_trainer_says_why(cluster):
    with RayTrainer(Unbuildable(), cost, RaySettings(num_workers=1)) as trainer:
        for ask in (trainer.process_ids, partial(trainer.train, jobs_from(small_adapter()))):
            with pytest.raises(ModelError, match="no such folder here") as raised:
                ask()
            assert raised.value.path == "elsewhere"


@pytest.mark.slow
def test_workers_the_cluster_cannot_hold_are_refused_at_once(cluster):
    with pytest.raises(RecipeError, match="4 workers with 1 CPUs each need 4, but Ray holds 3"):
        RayTrainer(Unbuildable(), cost, RaySettings(num_workers=4))
    with pytest.raises(RecipeError, match="GPUs each need 2"):
        RayTrainer(Unbuildable(), cost, RaySettings(num_workers=2, num_gpus=1))

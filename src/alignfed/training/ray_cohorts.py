"""Cohorts on Ray's workers: other processes, other GPUs, other machines. Where never decides what.

A result depends on its job and its cohort alone, so a worker that dies costs time: its cohort goes
to a fresh one.

Ray's own serialisation executes what it receives, and its ports ask nobody who they are: a Ray
cluster is one trust domain. Use it among your own machines, never towards clients' devices.

Ray is an optional dependency (``pip install alignfed[ray]``), imported when a trainer is made.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from alignfed.core.ports import TaskWork, TrainingJob, TrainingResult
from alignfed.core.update import Task
from alignfed.errors import AlignFedError, RecipeError
from alignfed.training.ray_worker import CohortWorker, MakesTrainer, PackedResult, pack, unpack

_POLL_S = 1.0


class WorkerLostError(AlignFedError):
    """A worker died with a cohort more often than allowed, or never came up."""


@dataclass(frozen=True, slots=True)
class RaySettings:
    """How many workers, what each is given, and how patient to be.

    Attributes:
        num_workers: processes that train.
        num_cpus: cores Ray sets aside for each; fractions share one.
        num_gpus: GPUs for each; fractions share one.
        threads: torch threads of each; sums over threads depend on their number, so equal numbers
            need it equal to the other side's.
        cohort_size: jobs trained together at most; None deals them evenly, once around.
        max_retries: how often a cohort is sent again after its worker died.
        start_timeout_s: how long a worker may take to be placed and built.
        address: of a running cluster, or "auto"; None starts Ray on this machine.

    Raises:
        RecipeError: a value outside its range.
    """

    num_workers: int = 2
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 1
    cohort_size: int | None = None
    max_retries: int = 2
    start_timeout_s: float = 600.0
    address: str | None = None

    def __post_init__(self) -> None:
        """Check each value against its range."""
        for name, least in (
            ("num_workers", 1),
            ("num_cpus", 0),
            ("num_gpus", 0),
            ("threads", 1),
            ("cohort_size", 1),
            ("max_retries", 0),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise RecipeError(f"ray {name} is {value}, must be at least {least} and finite")
        if not self.start_timeout_s > 0:
            raise RecipeError(f"ray start_timeout_s is {self.start_timeout_s}, must be above 0")


def deal(count: int, settings: RaySettings) -> list[range]:
    """Return consecutive cohorts of ``count`` jobs, equal to within one, in order."""
    if count == 0:
        return []
    cohorts = min(count, settings.num_workers)
    if settings.cohort_size is not None:
        cohorts = math.ceil(count / settings.cohort_size)
    ends = [count * i // cohorts for i in range(cohorts + 1)]
    return [range(start, end) for start, end in pairwise(ends)]


@dataclass(eq=False, slots=True)
class _Placed:
    """An actor, the promise that it is built, and since when it is awaited."""

    actor: Any
    ready: Any
    since_s: float
    is_ready: bool = False


class RayTrainer:
    """Trains cohorts on Ray's workers (``core.ports.ClientTrainer``). Close it when done."""

    def __init__(
        self,
        make_trainer: MakesTrainer,
        work: Callable[[Task], TaskWork],
        settings: RaySettings | None = None,
    ) -> None:
        """Start or join Ray, and have every worker begin to build.

        Args:
            make_trainer: what each worker builds its trainer with.
            work: what a task costs; asked here, for no worker is needed to know.
            settings: how many workers, and of what.

        Raises:
            RecipeError: Ray is not installed, or the cluster cannot hold the workers.
        """
        self.settings = settings = settings or RaySettings()
        self._work = work
        self._ray = _import_ray()
        found = self._ray.exceptions
        # The process, its machine, its place, or what it had computed is gone.
        self._lost = (
            found.RayActorError,
            found.NodeDiedError,
            found.OutOfMemoryError,
            found.ActorUnschedulableError,
            found.ObjectLostError,
        )
        self._started = not self._ray.is_initialized()
        if self._started:
            _start_ray(self._ray, settings)
        self._workers: list[_Placed] = []
        try:
            _require_room(self._ray, settings)
            self._make_trainer = self._ray.put(make_trainer)
            self._actor_class = self._ray.remote(CohortWorker).options(
                num_cpus=settings.num_cpus, num_gpus=settings.num_gpus, max_restarts=0
            )
            self._workers += [self._place() for _ in range(settings.num_workers)]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayTrainer:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the workers go."""
        self.close()

    def close(self) -> None:
        """Let the workers go, and stop Ray if it was started here. May be repeated."""
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers.clear()
        if self._started:
            self._started = False
            self._ray.shutdown()

    def process_ids(self) -> list[int]:
        """Wait until every worker is built, and return their process ids.

        Raises:
            AlignFedError: a worker cannot build its trainer.
            WorkerLostError: a worker died or did not come up in time.
        """
        limit_s = self.settings.start_timeout_s
        try:
            return list(self._ray.get([one.ready for one in self._workers], timeout=limit_s))
        except self._ray.exceptions.RayTaskError as error:
            raise _own_error(error) from error
        except (self._ray.exceptions.GetTimeoutError, *self._lost) as error:
            raise WorkerLostError(
                f"not every worker was up within {limit_s:g} s: {_line(error)}",
                start_timeout_s=limit_s,
            ) from error

    def work(self, task: Task) -> TaskWork:
        """Return what the task will cost, without computing it."""
        return self._work(task)

    def train(self, jobs: Sequence[TrainingJob]) -> list[TrainingResult]:
        """Return one result a job, in order, whichever worker computed it.

        Raises:
            WorkerLostError: workers died with a cohort more than ``max_retries`` times, or one
                did not come up in time.
            AlignFedError: what the trainer itself raised.
        """
        cohorts = deal(len(jobs), self.settings)
        # An adapter that many jobs start from is stored, and sent to a machine, once.
        stored = {id(job.adapter): job.adapter for job in jobs}
        references = {key: self._ray.put(pack(adapter)) for key, adapter in stored.items()}
        waiting, losses = deque(range(len(cohorts))), [0] * len(cohorts)
        free = list(reversed(self._workers))
        running: dict[Any, tuple[_Placed, int]] = {}
        results: dict[int, list[PackedResult]] = {}
        while waiting or running:
            while waiting and free:
                worker, cohort = free.pop(), waiting.popleft()
                members = [jobs[place] for place in cohorts[cohort]]
                running[self._send(worker, members, references)] = (worker, cohort)
            for done in self._finished(running):
                worker, cohort = running.pop(done)
                try:
                    results[cohort] = self._ray.get(done)
                except self._ray.exceptions.RayTaskError as error:
                    raise _own_error(error) from error
                except self._lost as error:
                    losses[cohort] += 1
                    worker = self._replace(worker)
                    if losses[cohort] > self.settings.max_retries:
                        raise _too_often(cohorts[cohort], jobs, losses[cohort], error) from error
                    waiting.appendleft(cohort)
                free.append(worker)
        return [
            TrainingResult(unpack(adapter), num_examples, metrics)
            for cohort in range(len(cohorts))
            for adapter, num_examples, metrics in results.pop(cohort)
        ]

    def _place(self) -> _Placed:
        actor = self._actor_class.remote(self._make_trainer, self.settings.threads)
        return _Placed(actor, actor.prepare.remote(), time.monotonic())

    def _replace(self, lost: _Placed) -> _Placed:
        # It may be out of reach and not dead: nothing is to come of it any more.
        self._ray.kill(lost.actor)
        fresh = self._place()
        self._workers[self._workers.index(lost)] = fresh
        return fresh

    def _send(
        self, worker: _Placed, members: Sequence[TrainingJob], references: Mapping[int, Any]
    ) -> Any:
        keys = list(dict.fromkeys(id(job.adapter) for job in members))
        place = {key: index for index, key in enumerate(keys)}
        tasks = [job.task for job in members]
        which = [place[id(job.adapter)] for job in members]
        return worker.actor.train.remote(tasks, which, *(references[key] for key in keys))

    def _finished(self, running: Mapping[Any, tuple[_Placed, int]]) -> list[Any]:
        """Wait a moment for cohorts to end; refuse to wait for a worker that never comes up."""
        done, _ = self._ray.wait(list(running), timeout=_POLL_S)
        for worker, _ in running.values():
            if not worker.is_ready:
                worker.is_ready = bool(self._ray.wait([worker.ready], timeout=0)[0])
                waited_s = time.monotonic() - worker.since_s
                if not worker.is_ready and waited_s > self.settings.start_timeout_s:
                    raise WorkerLostError(
                        f"a worker did not come up within {self.settings.start_timeout_s:g} s; is"
                        f" there a machine with {self.settings.num_cpus:g} CPUs and"
                        f" {self.settings.num_gpus:g} GPUs free? A slow one needs a higher"
                        " start_timeout_s",
                        start_timeout_s=self.settings.start_timeout_s,
                    )
        return list(done)


def _import_ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise RecipeError(
            "training on Ray's workers needs Ray, which is not installed; pip install alignfed[ray]"
        ) from error
    return ray


def _start_ray(ray: Any, settings: RaySettings) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    if settings.address is None:
        # Its count of CPUs is a count of places; threads decide what is used of the machine.
        options["address"] = "local"  # whatever cluster the environment names
        options["num_cpus"] = max(1, math.ceil(settings.num_workers * settings.num_cpus))
    else:
        options = {"address": settings.address, "log_to_driver": False}
    try:
        ray.init(configure_logging=False, **options)
    except ConnectionError as error:
        raise RecipeError(
            f"no Ray cluster answers at {settings.address!r}: {_line(error)}; start one with"
            " `ray start --head`, or leave address out",
            address=settings.address,
        ) from error


def _require_room(ray: Any, settings: RaySettings) -> None:
    held = ray.cluster_resources()
    for kind, each in (("CPU", settings.num_cpus), ("GPU", settings.num_gpus)):
        needed, found = each * settings.num_workers, held.get(kind, 0.0)
        if needed > found:
            raise RecipeError(
                f"{settings.num_workers} workers with {each:g} {kind}s each need {needed:g}, but"
                f" Ray holds {found:g}; use fewer workers, or a smaller share for each",
                needed=needed,
                found=found,
            )


def _own_error(error: Any) -> BaseException:
    """Return what the trainer raised, where it is an error of ours; else Ray's, with its trace."""
    cause = error.cause
    return cause if isinstance(cause, AlignFedError) else error


def _too_often(
    cohort: range, jobs: Sequence[TrainingJob], losses: int, error: Exception
) -> WorkerLostError:
    task_ids = [jobs[place].task.task_id for place in cohort]
    return WorkerLostError(
        f"workers died {losses} times over the cohort of {len(task_ids)} tasks that begins with"
        f" task {task_ids[0]}: {_line(error)}; if they run out of memory, use fewer workers or"
        " smaller cohorts",
        task_ids=task_ids,
        losses=losses,
    )


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]

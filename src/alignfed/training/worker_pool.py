"""Cohorts trained side by side in processes of this machine, while the run goes on.

Small models gain little from threads within an operation; whole cohorts beside each other use all
cores. A result depends on its job and on the jobs trained in the same pass, never on the process or
on how many there are; so a worker that is killed costs time, and its jobs go to a fresh one. The
processes are our own children: what travels between them never comes from outside.

They are forked from a server process that has imported the libraries once. ``start_server`` lets it
begin before this process has loaded anything heavy.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from types import ModuleType
from typing import Any

from alignfed.core.ports import TaskWork, TrainingJob, TrainingResult
from alignfed.core.update import Task
from alignfed.errors import ModelError
from alignfed.prestart import start_method, start_server
from alignfed.training.ray_worker import (
    CohortWorker,
    MakesTrainer,
    PackedAdapter,
    PackedResult,
    pack,
    unpack,
)

MAX_RETRIES = 2
"""How often jobs are sent again after a worker died with them."""

_worker: CohortWorker | None = None


class Share:
    """Jobs that a worker is given in one call (``core.ports.Pending``)."""

    def __init__(self, pool: PoolTrainer, jobs: Sequence[TrainingJob]) -> None:
        """Remember the jobs, to send them again should their worker die."""
        self._pool = pool
        self._results: list[TrainingResult] | None = None
        starts = {id(job.adapter): job.adapter for job in jobs}
        place = {key: index for index, key in enumerate(starts)}
        self.message = (
            [job.task for job in jobs],
            [place[id(job.adapter)] for job in jobs],
            [pack(adapter) for adapter in starts.values()],
        )
        self.deaths = 0
        self.future: Future[tuple[list[PackedResult], tuple[str, ...]]] = Future()

    def results(self) -> list[TrainingResult]:
        """Wait for the results, one a job, in order.

        Raises:
            ModelError: workers died with these jobs more than ``MAX_RETRIES`` times.
            AlignFedError: what the trainer itself raised.
        """
        while self._results is None:
            try:
                found, notes = self.future.result()
            except BrokenProcessPool:
                self._pool.renew()
                continue
            self._results = [
                TrainingResult(unpack(adapter), num_examples, metrics)
                for adapter, num_examples, metrics in found
            ]
            self._pool.take(self, notes)
        return self._results


class PoolTrainer:
    """Trains jobs in worker processes (``core.ports.BackgroundTrainer``)."""

    def __init__(
        self,
        make_trainer: MakesTrainer,
        work: Callable[[Task], TaskWork],
        num_workers: int,
        threads: int = 1,
    ) -> None:
        """Start the processes; each begins to load the base at once.

        Args:
            make_trainer: what each worker builds its trainer with.
            work: what a task costs; asked here, for no worker is needed to know.
            num_workers: processes, at least 1.
            threads: torch threads of each.
        """
        self._make_trainer = make_trainer
        self._work = work
        self._num_workers = num_workers
        self._threads = threads
        self._under_way: list[Share] = []
        self._notes: list[str] = []
        self._pool = self._start()

    def close(self) -> None:
        """Let the workers go. Without it they end with this object, or with this process."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def process_ids(self) -> set[int]:
        """Wait until a worker is built, and return the ids of those that were started."""
        self._pool.submit(_prepare).result()
        return set(self._pool._processes)

    def work(self, task: Task) -> TaskWork:
        """Return what the task will cost, without computing it."""
        return self._work(task)

    def submit(self, jobs: Sequence[TrainingJob]) -> Share:
        """Begin to train jobs together in one worker, after what was submitted before."""
        share = Share(self, jobs)
        self._under_way.append(share)
        self._send(share)
        return share

    def train(self, jobs: Sequence[TrainingJob]) -> list[TrainingResult]:
        """Return one result a job, in order, whichever worker computed it.

        Jobs are dealt in order, as evenly as can be, one share a worker.

        Raises:
            ModelError: workers died with the same jobs more than ``MAX_RETRIES`` times.
            AlignFedError: what the trainer itself raised.
        """
        dealt = deal(len(jobs), self._num_workers)
        shares = [self.submit([jobs[place] for place in places]) for places in dealt]
        return [result for share in shares for result in share.results()]

    def renew(self) -> None:
        """Start fresh workers after one has died, and give them what was lost.

        Raises:
            ModelError: the same jobs were lost more than ``MAX_RETRIES`` times.
        """
        self.close()
        self._pool = self._start()
        for share in self._under_way:
            if share.future.done() and share.future.exception() is None:
                continue
            share.deaths += 1
            if share.deaths > MAX_RETRIES:
                raise ModelError(
                    f"training processes died {share.deaths} times in a row; if they run out of"
                    " memory, lower training.workers or training.cohort_size",
                    workers=self._num_workers,
                )
            self._send(share)

    def take(self, share: Share, notes: Sequence[str]) -> None:
        """Take note that a share's results have been taken, and of what its worker met."""
        self._under_way.remove(share)
        self._notes += [note for note in notes if note not in self._notes]

    def take_notes(self) -> tuple[str, ...]:
        """Return what workers have met since last asked that a run's record should say."""
        notes, self._notes = tuple(self._notes), []
        return notes

    def _send(self, share: Share) -> None:
        with _without_main():
            try:
                share.future = self._pool.submit(_train, *share.message)
            except BrokenProcessPool as error:
                # A worker that was idle has died: whoever waits for the results finds out.
                share.future = Future()
                share.future.set_exception(error)

    def _start(self) -> ProcessPoolExecutor:
        start_server()
        pool = ProcessPoolExecutor(
            self._num_workers,
            multiprocessing.get_context(start_method()),
            initializer=_begin,
            initargs=(self._make_trainer, self._threads),
        )
        with _without_main():
            for _ in range(self._num_workers):
                pool.submit(_prepare)
        return pool


def deal(count: int, shares: int) -> list[range]:
    """Return ``count`` places in order as consecutive shares, equal to within one, none empty."""
    shares = min(count, shares)
    return [
        range(*ends) for ends in pairwise(count * i // max(1, shares) for i in range(shares + 1))
    ]


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that do not run the caller's script again.

    multiprocessing would import it for what a script may define; workers need nothing of it, and a
    script without ``if __name__ == "__main__"`` would begin its run anew in each of them.
    """
    main: Any = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _begin(make_trainer: MakesTrainer, threads: int) -> None:
    """In a worker: keep what the trainer is built from, and end when the run's process does."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = CohortWorker(make_trainer, threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _prepare() -> int:
    assert _worker is not None
    return _worker.prepare()


def _train(
    tasks: list[Task], which: list[int], adapters: list[PackedAdapter]
) -> tuple[list[PackedResult], tuple[str, ...]]:
    assert _worker is not None
    return _worker.train(tasks, which, *adapters), _worker.take_notes()

"""Which tasks are computed when: what is needed now, and with it others that will be needed.

What a client computes is fixed when it is dispatched, so that any task under way may be computed at
any time. Who is computed with whom follows from the clock's events alone, never from who was fast.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import pairwise

from alignfed.core.distance import small_distances
from alignfed.core.ports import BackgroundTrainer, ClientTrainer, Journal, Pending, TrainingJob
from alignfed.core.state import StopConditions
from alignfed.simulation.clock import VirtualClock
from alignfed.simulation.state import ClockEvent, EngineState, RunningTask, UploadDue


class Lookahead:
    """Gets results of tasks under way from a trainer, as many together as it may."""

    def __init__(
        self,
        clock: VirtualClock[ClockEvent, UploadDue],
        trainer: ClientTrainer,
        stop: StopConditions,
        journal: Journal | None,
        *,
        cohort_size: int,
        held: int,
        measures: bool = False,
        computed: Iterable[int] = (),
    ) -> None:
        """Begin with nothing asked for.

        Args:
            clock: tells whose uploads come next.
            trainer: computes; one that works in the background is given cohorts ahead of time.
            stop: when the run ends: no task is computed that will report too late.
            journal: keeps which tasks were computed together, where more than one may be.
            cohort_size: how many to compute together at most.
            held: how many tasks a trainer in the background may hold at most, results not yet due
                included.
            measures: whether what is trained is what the server will measure, so that a cohort's
                small adapters may be measured together.
            computed: ids of tasks under way whose results are there.
        """
        self._clock = clock
        self._trainer = trainer
        self._background = trainer if isinstance(trainer, BackgroundTrainer) else None
        self._stop = stop
        self._journal = journal
        self._cohort_size = cohort_size
        self._held = max(cohort_size, held)
        self._measures = measures
        self._sent: dict[int, tuple[Pending, int]] = {}
        self._collected = set(computed)
        self._distances: dict[int, float] = {}
        # What the clock told of and no whole cohort had room for, earliest first.
        self._left: list[RunningTask] = []

    def compute(self, needed: RunningTask, state: EngineState) -> float | None:
        """See that a task's result is there, and that others will be when they are needed.

        Returns:
            How far the result has moved from its base, where that has been found out already. It is
            never part of a checkpoint: the coordinator finds the very same number by itself.
        """
        if self._background is not None:
            for cohort in self._cohorts_to_send(needed, state):
                pending = self._background.submit(_jobs(cohort))
                for place, running in enumerate(cohort):
                    self._sent[running.task.task_id] = (pending, place)
                self._record(cohort, state.now_s)
            self.collect(needed)
            self._collected.discard(needed.task.task_id)
        elif needed.result is None:
            cohort = [needed, *self._worth_computing(needed, self._cohort_size - 1, state)]
            for running, result in zip(cohort, self._trainer.train(_jobs(cohort)), strict=True):
                running.result = result
            self._record(cohort, state.now_s)
            if self._measures and len(cohort) > 1:
                self._measure(cohort)
        return self._distances.pop(needed.task.task_id, None)

    @property
    def outstanding(self) -> int:
        """Results asked for in the background and not taken yet."""
        return len(self._sent)

    def collect(self, running: RunningTask) -> None:
        """Wait for a task's result, if it was asked for and has not been taken yet."""
        found = self._sent.pop(running.task.task_id, None)
        if found is not None:
            pending, place = found
            running.result = pending.results()[place]
            self._collected.add(running.task.task_id)

    def forget(self, task_id: int) -> None:
        """Let a task's result go, if it was asked for: nobody will want it."""
        self._sent.pop(task_id, None)
        self._collected.discard(task_id)
        self._distances.pop(task_id, None)

    def _cohorts_to_send(self, needed: RunningTask, state: EngineState) -> list[list[RunningTask]]:
        """Return what a background trainer is to begin with: what is needed, and whole cohorts.

        Whether a result has come back yet makes no difference, only that it was asked for.
        """
        size = self._cohort_size
        room = self._held - len(self._sent) - len(self._collected)
        if not self.asked_for(needed):
            waiting = [needed, *self._worth_computing(needed, room - 1, state)]
        elif room < size:
            return []
        else:
            waiting = self._worth_computing(needed, room, state)
            whole = len(waiting) // size * size
            self._left[:0] = waiting[whole:]
            waiting = waiting[:whole]
        number = math.ceil(len(waiting) / size)
        ends = [len(waiting) * i // max(1, number) for i in range(number + 1)]
        return [waiting[start:end] for start, end in pairwise(ends)]

    def _worth_computing(
        self, needed: RunningTask, most: int, state: EngineState
    ) -> list[RunningTask]:
        """Tasks not asked for that will report before the run can end, earliest first."""
        under_way, awaited, sent = state.running, state.coordinator.tasks, self._sent
        found: list[RunningTask] = []
        remaining = self._stop.max_uploads - state.coordinator.received - 1
        width = int(min(most, remaining))
        if width <= 0:
            return found
        if len(under_way) - 1 > remaining:
            return self._before_the_end(needed, width, int(remaining), state)
        left = self._left = [
            running
            for running in self._left
            if not self.asked_for(running)
            and running is not needed
            and running.task.task_id in under_way
            and running.task.task_id in awaited
        ]
        with closing(self._clock.ahead()) as ahead:
            for due in ahead:
                task_id = due.task_id
                running = under_way.get(task_id)
                if running is None or running.result is not None:
                    continue
                if task_id in sent or task_id not in awaited:
                    continue
                if running.arrival_s > self._stop.max_time_s:
                    break
                if left:
                    insort(left, running, key=_arrival)
                    running = left.pop(0)
                found.append(running)
                if len(found) == width:
                    return found
        room = width - len(found)
        found += left[:room]
        del left[:room]
        return found

    def _before_the_end(
        self, needed: RunningTask, width: int, remaining: int, state: EngineState
    ) -> list[RunningTask]:
        """Tasks not asked for, where more are under way than uploads are left."""
        others = sorted(
            (running.arrival_s, running.task.task_id, running)
            for running in state.running.values()
            if running is not needed
            and math.isfinite(running.arrival_s)
            and running.arrival_s <= self._stop.max_time_s
            and running.task.task_id in state.coordinator.tasks
        )
        # Those already computed count too: they arrive before the run ends and use up its limit.
        within = [running for _, _, running in others[:remaining]]
        return [running for running in within if not self.asked_for(running)][:width]

    def _measure(self, cohort: Sequence[RunningTask]) -> None:
        results = [running.result.adapter for running in cohort if running.result is not None]
        found = small_distances(results, [running.adapter for running in cohort])
        if found is not None:
            self._distances.update(
                zip([running.task.task_id for running in cohort], found, strict=True)
            )

    def asked_for(self, running: RunningTask) -> bool:
        """Whether a task's result is there, or on its way."""
        return running.result is not None or running.task.task_id in self._sent

    def _record(self, cohort: Sequence[RunningTask], now_s: float) -> None:
        # Where a task is computed with no other, there is nothing to keep.
        if self._journal is not None and self._cohort_size > 1:
            self._journal.record_cohort(now_s, [running.task.task_id for running in cohort])


def _arrival(running: RunningTask) -> tuple[float, int]:
    return running.arrival_s, running.task.task_id


def _jobs(cohort: Sequence[RunningTask]) -> list[TrainingJob]:
    return [TrainingJob(running.task, running.adapter) for running in cohort]

"""Which tasks are computed when: what is needed now, and with it others that will be needed.

What a client computes is fixed when it is dispatched, so that any task under way may be computed at
any time. Who is computed with whom follows from the clock's events alone, never from who was fast.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import pairwise

from alignfed.core.distance import small_distances
from alignfed.core.ports import BackgroundTrainer, ClientTrainer, Journal, Pending, TrainingJob
from alignfed.core.state import StopConditions
from alignfed.simulation.state import EngineState, RunningTask


class Lookahead:
    """Gets results of tasks under way from a trainer, as many together as it may."""

    def __init__(
        self,
        trainer: ClientTrainer,
        stop: StopConditions,
        journal: Journal | None,
        *,
        cohort_size: int,
        held: int,
        measures: bool = False,
    ) -> None:
        """Begin with nothing asked for.

        Args:
            trainer: computes; one that works in the background is given cohorts ahead of time.
            stop: when the run ends: no task is computed that will report too late.
            journal: keeps which tasks were computed together, where more than one may be.
            cohort_size: how many to compute together at most.
            held: how many tasks a trainer in the background may hold at most, results not yet due
                included.
            measures: whether what is trained is what the server will measure, so that a cohort's
                small adapters may be measured together.
        """
        self._trainer = trainer
        self._background = trainer if isinstance(trainer, BackgroundTrainer) else None
        self._stop = stop
        self._journal = journal
        self._cohort_size = cohort_size
        self._held = max(cohort_size, held)
        self._measures = measures
        self._sent: dict[int, tuple[Pending, int]] = {}
        self._distances: dict[int, float] = {}
        # Tasks that may be computed early: a heap, from which those that are not to be any more
        # are only taken when they come to its top.
        self._early: list[tuple[float, int, RunningTask]] = []
        self._computes_early = cohort_size > 1 or self._background is not None

    def add(self, running: RunningTask) -> None:
        """Take note of a task under way that has not been computed."""
        if self._computes_early and running.arrival_s < math.inf:  # else its upload will be lost
            heapq.heappush(self._early, (running.arrival_s, running.task.task_id, running))

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

    def forget(self, task_id: int) -> None:
        """Let a task's result go, if it was asked for: nobody will want it."""
        self._sent.pop(task_id, None)
        self._distances.pop(task_id, None)

    def _cohorts_to_send(self, needed: RunningTask, state: EngineState) -> list[list[RunningTask]]:
        """Return what a background trainer is to begin with: what is needed, and whole cohorts.

        Whether a result has come back yet makes no difference, only that it was asked for.
        """
        size = self._cohort_size
        room = self._held - sum(self.asked_for(one) for one in state.running.values())
        if not self.asked_for(needed):
            waiting = [needed, *self._worth_computing(needed, room - 1, state)]
        else:
            waiting = self._worth_computing(needed, room, state)
            whole = len(waiting) // size * size
            for running in waiting[whole:]:
                self.add(running)
            waiting = waiting[:whole]
        number = math.ceil(len(waiting) / size)
        ends = [len(waiting) * i // max(1, number) for i in range(number + 1)]
        return [waiting[start:end] for start, end in pairwise(ends)]

    def _worth_computing(
        self, needed: RunningTask, most: int, state: EngineState
    ) -> list[RunningTask]:
        """Tasks not asked for that will report before the run can end, earliest first."""
        early, under_way, found = self._early, state.running, list[RunningTask]()
        remaining = self._stop.max_uploads - state.coordinator.received - 1
        width = int(min(most, remaining))
        if width <= 0:
            return found
        if len(under_way) - 1 > remaining:
            return self._before_the_end(needed, width, int(remaining), state)
        awaited, sent = state.coordinator.tasks, self._sent
        while early and len(found) < width and early[0][0] <= self._stop.max_time_s:
            _, task_id, running = heapq.heappop(early)
            if (
                running.result is None
                and running is not needed
                and task_id not in sent
                and task_id in awaited
                and under_way.get(task_id) is running
            ):
                found.append(running)
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


def _jobs(cohort: Sequence[RunningTask]) -> list[TrainingJob]:
    return [TrainingJob(running.task, running.adapter) for running in cohort]

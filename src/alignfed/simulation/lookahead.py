"""Which tasks are computed when: what is needed now, and with it others that will be needed.

What a client computes is fixed when it is dispatched, so that any task under way may be computed at
any time. Who is computed with whom follows from the clock's events alone, never from who was fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

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
    ) -> None:
        """Begin with nothing asked for.

        Args:
            trainer: computes; one that works in the background is given cohorts ahead of time.
            stop: when the run ends: no task is computed that will report too late.
            journal: keeps which tasks were computed together.
            cohort_size: how many to compute together at most.
            held: how many tasks a trainer in the background may hold at most, results not yet due
                included.
        """
        self._trainer = trainer
        self._background = trainer if isinstance(trainer, BackgroundTrainer) else None
        self._stop = stop
        self._journal = journal
        self._cohort_size = cohort_size
        self._held = max(cohort_size, held)
        self._sent: dict[int, tuple[Pending, int]] = {}

    def compute(self, needed: RunningTask, state: EngineState) -> None:
        """See that a task's result is there, and that others will be when they are needed."""
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
            waiting = waiting[: len(waiting) // size * size]
        number = math.ceil(len(waiting) / size)
        ends = [len(waiting) * i // max(1, number) for i in range(number + 1)]
        return [waiting[start:end] for start, end in pairwise(ends)]

    def _worth_computing(
        self, needed: RunningTask, most: int, state: EngineState
    ) -> list[RunningTask]:
        """Tasks not asked for that will report before the run can end, earliest first."""
        remaining = self._stop.max_uploads - state.coordinator.received - 1
        width = int(min(most, remaining))
        if width <= 0:
            return []
        tasks = state.coordinator.tasks
        others = sorted(
            (running.arrival_s, running.task.task_id, running)
            for running in state.running.values()
            if running is not needed
            and running.arrival_s <= self._stop.max_time_s
            and running.task.task_id in tasks
        )
        # Those already computed count too: they arrive before the run ends and use up its limit.
        within = others if math.isinf(remaining) else others[: int(remaining)]
        return [running for _, _, running in within if not self.asked_for(running)][:width]

    def asked_for(self, running: RunningTask) -> bool:
        """Whether a task's result is there, or on its way."""
        return running.result is not None or running.task.task_id in self._sent

    def _record(self, cohort: Sequence[RunningTask], now_s: float) -> None:
        if self._journal is not None:
            self._journal.record_cohort(now_s, [running.task.task_id for running in cohort])


def _jobs(cohort: Sequence[RunningTask]) -> list[TrainingJob]:
    return [TrainingJob(running.task, running.adapter) for running in cohort]

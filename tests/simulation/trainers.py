"""A trainer whose results depend on the job alone and cost nothing to compute."""

from __future__ import annotations

from collections.abc import Sequence

from alignfed.core.ports import TaskWork, TrainingJob, TrainingResult
from alignfed.core.update import Task
from tests.core.adapters import moved


class NudgeTrainer:
    """Moves each adapter by a small step drawn from (client, dispatch)."""

    def __init__(self, tokens: int = 100) -> None:
        self.tokens = tokens
        self.cohorts: list[list[int]] = []

    def work(self, task: Task) -> TaskWork:
        return TaskWork(self.tokens + task.client_id, 10.0)

    def train(self, jobs: Sequence[TrainingJob]) -> list[TrainingResult]:
        self.cohorts.append([job.task.task_id for job in jobs])
        return [
            TrainingResult(
                moved(job.adapter, 1000 * job.task.client_id + job.task.dispatch), 4, {"loss": 1.0}
            )
            for job in jobs
        ]

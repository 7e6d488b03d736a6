"""How long a synchronous FedAvg would have taken: by the clock alone, nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from alignfed.build import Simulation
from alignfed.core.aggregation import make_rule
from alignfed.core.ports import (
    AggregationRule,
    ClientTrainer,
    TaskWork,
    TrainingJob,
    TrainingResult,
)
from alignfed.core.state import StopConditions
from alignfed.core.update import Task
from alignfed.simulation.engine import Engine, EngineParts

MOST_IDLE_EVENTS = 10_000
"""Events without an upload after which the reference counts as never ending."""

MOST_STEPS = 500_000
STEPS_PER_UPLOAD = 1_000
"""Clock events it may take, in all and for each upload; a healthy run takes a few an upload."""


def synchronous_time_s(simulation: Simulation, uploads: int) -> float | None:
    """Return when a synchronous FedAvg would have received as many uploads.

    None where it would come to a standstill, or take so many events that nobody would wait.
    """
    if uploads == 0:
        return None
    engine = Engine(synchronous_reference(simulation, uploads), simulation.initial_adapter)
    for _ in range(MOST_STEPS + STEPS_PER_UPLOAD * uploads):
        if not engine.step():
            break
    return engine.state.now_s if engine.finished else None


class ClockTrainer:
    """Takes as long as the real trainer and learns nothing: for times alone."""

    def __init__(self, trainer: ClientTrainer) -> None:
        """Ask ``trainer`` what tasks cost."""
        self._trainer = trainer

    def work(self, task: Task) -> TaskWork:
        """Return what the real trainer's task costs."""
        return self._trainer.work(task)

    def train(self, jobs: Sequence[TrainingJob]) -> list[TrainingResult]:
        """Return every client's adapter as it was sent."""
        return [TrainingResult(job.adapter, 1) for job in jobs]


def synchronous_reference(simulation: Simulation, uploads: int) -> EngineParts:
    """Return an engine's parts for a synchronous FedAvg by the clock alone.

    It gives the same clients the same tasks on the same devices, until as many uploads have come.
    """
    parts = simulation.parts
    rule: AggregationRule = make_rule("fedavg")
    own = parts.coordinator.settings
    # An asynchronous buffer's age is no limit for a round: a round ends when everybody answered.
    # FedAvg as published gives everybody the same steps.
    timeout_s = own.flush_timeout_s if parts.coordinator.rule.synchronous else math.inf
    stop = StopConditions(max_uploads=uploads)
    settings = replace(own, flush_timeout_s=timeout_s, stop=stop, local_steps=None)
    return replace(
        parts,
        coordinator=replace(parts.coordinator, rule=rule, settings=settings, calibrator=None),
        trainer=ClockTrainer(parts.trainer),
        evaluate=None,
        evaluate_own=None,
        journal=None,
        cohort_size=1,
        most_idle_events=MOST_IDLE_EVENTS,
    )

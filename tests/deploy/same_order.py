"""What the simulator's trainer makes of a recorded run's events, in the order on record.

Asynchronous runs differ by the order in which uploads come, and real time has its own. So a
deployed run is held against the simulator doing the same tasks in the same order.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from alignfed.build import build_simulation
from alignfed.config import load_recipe
from alignfed.core.events import UpdateArrived
from alignfed.core.instructions import Dispatch
from alignfed.core.ports import TrainingJob
from alignfed.journal import RunReader
from alignfed.journal.recorded import decode_event


def loss_in_the_same_order(run: Path) -> float:
    """Return the final loss of the simulator's trainer and coordinator over a run's events."""
    simulation = build_simulation(load_recipe(run / "recipe.toml"))
    coordinator, trainer = simulation.parts.coordinator, simulation.parts.trainer
    initial = simulation.initial_adapter
    state = coordinator.initial_state(initial)
    jobs: dict[int, TrainingJob] = {}
    with RunReader(run) as reader:
        rows = [row for row in reader.rows() if row.kind == "event"]
    for row in rows:
        event = decode_event(row, lambda checksum: initial)
        if isinstance(event, UpdateArrived) and event.update.task_id in jobs:
            (result,) = trainer.train([jobs.pop(event.update.task_id)])
            event = replace(event, update=replace(event.update, adapter=result.adapter))
        state, instructions = coordinator.handle(state, event)
        for one in instructions:
            if isinstance(one, Dispatch):
                jobs[one.task.task_id] = TrainingJob(one.task, one.adapter)
    return simulation.evaluator.evaluate(state.adapter, with_score=False).loss

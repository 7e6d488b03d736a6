"""A real coordinator over small adapters, and the answers its clients would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignfed.core.aggregation.fedbuff import FedBuff
from alignfed.core.coordinator import Coordinator
from alignfed.core.events import ClientJoined, RunStarted
from alignfed.core.instructions import Dispatch, Instruction
from alignfed.core.lora.factor import FactorMean
from alignfed.core.ports import AggregationRule
from alignfed.core.state import CoordinatorSettings, CoordinatorState
from alignfed.core.update import Task, Update
from tests.core.adapters import make_adapter, moved


def start(
    *,
    clients: int,
    concurrency: int,
    buffer_size: int,
    rule: AggregationRule | None = None,
    **settings: Any,
) -> tuple[Coordinator, CoordinatorState, list[Instruction]]:
    """Return a coordinator whose run has just started with ``clients`` clients online."""
    coordinator = Coordinator(
        CoordinatorSettings(concurrency, buffer_size, **settings), rule or FedBuff(), FactorMean()
    )
    state = coordinator.initial_state(make_adapter())
    out: list[Instruction] = []
    for client_id in range(clients):
        state, more = coordinator.handle(state, ClientJoined(0.0, client_id))
        out += more
    state, more = coordinator.handle(state, RunStarted(0.0))
    return coordinator, state, out + more


def dispatches(instructions: Sequence[Instruction]) -> list[Task]:
    """Return the dispatched tasks."""
    return [i.task for i in instructions if isinstance(i, Dispatch)]


def answer(state: CoordinatorState, task: Task, seed: int, scale: float = 0.1) -> Update:
    """Return an honest upload for a task in flight."""
    base = state.snapshots[task.base_version].adapter
    return Update(
        task.task_id, task.client_id, task.base_version, moved(base, seed, scale), 8, {"loss": 1.0}
    )

"""What a deployed server's checkpoint holds, and what is still to be done where it goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from alignfed.core.adapter import Adapter
from alignfed.core.events import EvaluationFinished, Event
from alignfed.core.instructions import Dispatch, Evaluate, Instruction, SetTimer, Stop
from alignfed.core.lora import Exchange
from alignfed.core.state import CoordinatorState

MOST_OPEN_EVALUATIONS = 8
"""A driver that answers no ``Evaluate`` must not make the state grow; the oldest is forgotten."""


@dataclass(slots=True)
class ServerState:
    """What a deployed server's checkpoint holds.

    Attributes:
        coordinator: the coordinator's state.
        unscored: adapters of versions whose ``EvaluationFinished`` is still to come, by version.
    """

    coordinator: CoordinatorState
    unscored: dict[int, Adapter] = field(default_factory=dict)

    def note(self, event: Event, instructions: Sequence[Instruction]) -> None:
        """Keep up with an event that the coordinator has handled."""
        if isinstance(event, EvaluationFinished):
            self.unscored.pop(event.version, None)
        for instruction in instructions:
            if isinstance(instruction, Evaluate):
                self.unscored[instruction.version] = instruction.adapter
        while len(self.unscored) > MOST_OPEN_EVALUATIONS:
            del self.unscored[min(self.unscored)]


@dataclass(frozen=True, slots=True)
class RecoveredServer:
    """Where a server goes on.

    Attributes:
        state: the coordinator's, after every recorded event.
        instructions: what is still to be carried out: a ``Dispatch`` for every task in flight
            (its device may have it already, or have finished it: task ids are idempotent), an
            ``Evaluate`` for every version whose ``EvaluationFinished`` is not on record, the
            latest ``SetTimer``, and ``Stop`` where the run is over.
        time_s: the driver's clock at the last recorded event; later events must not be earlier.
        rehandled: events handled again after the checkpoint.
        warnings: damage that was met and passed over, in words.
    """

    state: CoordinatorState
    instructions: tuple[Instruction, ...]
    time_s: float
    rehandled: int
    warnings: tuple[str, ...]


def open_instructions(server: ServerState, exchange: Exchange) -> tuple[Instruction, ...]:
    """Return what the coordinator asked for and nothing on record answers."""
    state = server.coordinator
    unscored = sorted(server.unscored.items())
    evaluations = tuple(Evaluate(version, adapter) for version, adapter in unscored)
    if state.stopped is not None:
        return (*evaluations, Stop(state.stopped, state.version))
    dispatches = (
        Dispatch(task, state.snapshots[task.base_version].sent_to(exchange, task.client_id))
        for task in state.tasks.values()
    )
    timers = (SetTimer(state.wake_at_s),) if state.wake_at_s < math.inf else ()
    return (*dispatches, *evaluations, *timers)

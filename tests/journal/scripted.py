"""A run without devices: a real coordinator whose clients answer at once, by a fixed script."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from alignfed.core.adapter import Adapter
from alignfed.core.aggregation.fedbuff import FedBuff, FedBuffState
from alignfed.core.coordinator import Coordinator
from alignfed.core.events import (
    ClientJoined,
    EvaluationFinished,
    Event,
    RunStarted,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from alignfed.core.instructions import Dispatch, Evaluate, SetTimer
from alignfed.core.lora.factor import FactorMean
from alignfed.core.state import CoordinatorSettings, CoordinatorState
from alignfed.core.update import Update
from alignfed.journal import Batching, Checkpoints, Codec, RunMeta, SqliteJournal
from tests.core.adapters import make_adapter, moved

META = RunMeta(alignfed_version="0.1.0", recipe_sha256="ab" * 32, seed=7)
CLIENTS = 5


@dataclass(slots=True)
class DriverState:
    """The scripted driver's whole state, one of everything a real one holds."""

    coordinator: CoordinatorState
    coming: deque[Event]
    steps: int = 0
    moments: torch.Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.bfloat16))
    half: Adapter = field(default_factory=lambda: make_adapter(3, dtype=torch.bfloat16))


CODEC_CLASSES = (DriverState, FedBuffState)


def coordinator() -> Coordinator:
    return Coordinator(CoordinatorSettings(concurrency=3, buffer_size=2), FedBuff(), FactorMean())


def beginning() -> DriverState:
    joins = [ClientJoined(0.0, client_id) for client_id in range(CLIENTS)]
    return DriverState(
        coordinator().initial_state(make_adapter()), deque([*joins, RunStarted(0.0)])
    )


def answer(dispatch: Dispatch, time_s: float) -> Event:
    """What the script's client sends back: mostly good, sometimes NaN, sometimes nothing."""
    task = dispatch.task
    adapter = moved(dispatch.adapter, task.task_id)
    if task.task_id % 11 == 7:
        return TaskFailed(time_s, task.task_id, task.client_id, "battery empty")
    if task.task_id % 5 == 3:
        adapter.buffers[torch.float32][0] = math.nan
    metrics = {"loss": 3.0 / (1 + task.task_id)}
    return UpdateArrived(
        time_s,
        Update(task.task_id, task.client_id, task.base_version, adapter, 12, metrics),
    )


def step(state: DriverState, journal: SqliteJournal) -> None:
    """Handle one event and write it down."""
    event = state.coming.popleft()
    state.steps += 1
    if state.steps % 4 == 0:
        journal.record_cohort(event.time_s, sorted(state.coordinator.tasks))
    state.coordinator, instructions = coordinator().handle(state.coordinator, event)
    journal.record(event, instructions)
    state.moments += 0.5
    time_s = float(state.steps)
    for instruction in instructions:
        if isinstance(instruction, Dispatch):
            state.coming.append(answer(instruction, time_s))
        elif isinstance(instruction, Evaluate):
            loss = 2.0 / (1 + instruction.version)
            state.coming.append(EvaluationFinished(time_s, instruction.version, loss))
        elif isinstance(instruction, SetTimer):
            state.coming.append(TimerFired(max(time_s, instruction.at_s)))


def create(root: Path, **options: Any) -> tuple[SqliteJournal, Checkpoints]:
    journal = SqliteJournal.create(root, META, wall_clock=lambda: 0.0, **options)
    return journal, Checkpoints(journal, Codec(*CODEC_CLASSES))


def reopen(root: Path, **options: Any) -> tuple[SqliteJournal, Checkpoints]:
    journal = SqliteJournal(root, wall_clock=lambda: 0.0, **options)
    return journal, Checkpoints(journal, Codec(*CODEC_CLASSES))


class Undisturbed:
    """A run that nobody kills, to compare with; it only moves forward."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.journal, _ = create(root)
        self.state = beginning()

    def advance(self, steps: int) -> list[tuple[Any, ...]]:
        """Go on to that many steps in all; return all rows so far."""
        assert steps >= self.state.steps
        while self.state.steps < steps:
            step(self.state, self.journal)
        return list(self.journal.rows_without_wall_time())


def fingerprint(state: DriverState) -> str:
    """Equal for equal states, to the last bit."""
    return Codec(*CODEC_CLASSES).encode(state).text


# --- what child processes run; they die by their own or their parent's signal 9 ---------------


def forget_power_cuts() -> None:
    """As the fixture of this name does for the parent."""
    os.fsync = lambda fd: None


def run_until_killed(root: Path, connection: Connection) -> None:
    """Begin or resume the run and go on, with a checkpoint every few steps, until killed."""
    torch.set_num_threads(1)
    forget_power_cuts()
    batching = Batching(max_rows=7)
    state = None
    if (root / "journal.sqlite").exists():
        journal, checkpoints = reopen(root, batching=batching)
        state = checkpoints.recover().state
    else:
        journal, checkpoints = create(root, batching=batching)
    state = state or beginning()
    connection.send(state.steps)
    while True:
        step(state, journal)
        if state.steps % 6 == 0:
            checkpoints.write(state)


def die_while_writing(root: Path, calls: int, connection: Connection) -> None:
    """Write a first checkpoint whole, then die after so many calls inside the second."""
    torch.set_num_threads(1)
    forget_power_cuts()
    journal, checkpoints = create(root)
    state = beginning()
    for _ in range(12):
        step(state, journal)
    checkpoints.write(state)
    for _ in range(12):
        step(state, journal)
    connection.send(die_after(calls, lambda: checkpoints.write(state)))


def die_after(calls: int, action: Callable[[], None]) -> int:
    """Run ``action`` and kill this process at its ``calls``-th call; return how many it made."""
    made = 0

    def count(frame: object, kind: str, argument: object) -> None:
        nonlocal made
        if kind in ("call", "c_call", "c_return"):
            made += 1
            if made == calls:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return made


def hold(root: Path, connection: Connection) -> None:
    """Hold a run's directory until killed."""
    create(root)
    connection.send("held")
    connection.recv()

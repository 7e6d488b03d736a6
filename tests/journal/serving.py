"""A server in small: a real coordinator, real uploads, and devices that keep them until told.

The devices are a function of the task, as real ones are: what they computed once is what they send
again. Only what a restarted server recovers tells it what is still to be done.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from alignfed.core.adapter import Adapter
from alignfed.core.aggregation import make_rule
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
from alignfed.core.instructions import Dispatch, Evaluate, Instruction, SetTimer, Stop
from alignfed.core.lora import Exchange, make_lora_rule
from alignfed.core.state import CoordinatorSettings, CoordinatorState, StopConditions
from alignfed.core.update import Update
from alignfed.journal import Codec, DurableLog, RunMeta
from alignfed.journal.codec import rule_state_class
from tests.core.adapters import make_adapter, moved
from tests.journal import scripted

META = RunMeta(alignfed_version="0.1.0", recipe_sha256="ab" * 32, seed=7)
CLIENTS = 4


class Calibration:
    """A calibrator that is quick: the loss is the distance from where training should lead."""

    tokens = 64

    def __init__(self) -> None:
        self.goal = make_adapter(99)
        self.asked = 0

    def loss(self, adapter: Adapter) -> float:
        self.asked += 1
        return sum(
            float((buffer - self.goal.buffers[dtype]).double().square().sum())
            for dtype, buffer in adapter.buffers.items()
        )

    def inputs(self, adapter: Adapter) -> dict[str, torch.Tensor]:
        self.asked += 1
        generator = torch.Generator().manual_seed(1)
        return {
            name: torch.randn(12, shape.in_dim, generator=generator)
            for name, shape in adapter.layout.lora
        }

    def features(self, adapter: Adapter) -> torch.Tensor:
        self.asked += 1
        parts = [buffer.float() for buffer in adapter.buffers.values()]
        return torch.tanh(torch.cat(parts)[:48].reshape(12, 4))


def make_coordinator(rule: str = "alignfed", uploads: float = math.inf, **settings: Any) -> Any:
    return Coordinator(
        CoordinatorSettings(3, 2, stop=StopConditions(max_uploads=uploads)),
        make_rule(rule, **settings),
        make_lora_rule("factor"),
        Calibration(),
    )


def answer(dispatch: Dispatch, time_s: float, exchange: Exchange) -> Event:
    """What a device sends: mostly good, sometimes NaN, sometimes that it failed."""
    task = dispatch.task
    if task.task_id % 13 == 5:
        return TaskFailed(time_s, task.task_id, task.client_id, "battery empty")
    adapter = exchange.upload(moved(dispatch.adapter, task.task_id))
    if task.task_id % 9 == 4:
        adapter.buffers[torch.float32][0] = math.nan
    metrics = {"loss": 3.0 / (1 + task.task_id), "tokens": 40.0}
    update = Update(task.task_id, task.client_id, task.base_version, adapter, 12, metrics)
    return UpdateArrived(time_s, update)


@dataclass
class Server:
    """The driver: handles, records, syncs, and only then acts.

    Attributes:
        log: the record.
        state: the coordinator's.
        to_do: instructions that are on record and not carried out.
        acknowledged: task ids that devices were told they may forget.
        handled: events since this process began.
        seen: is told the state after each event, if wanted.
    """

    log: DurableLog
    state: CoordinatorState
    to_do: list[Instruction]
    time_s: float = 0.0
    acknowledged: list[int] = field(default_factory=list)
    handled: int = 0
    seen: list[str] | None = None

    @classmethod
    def begin(
        cls,
        root: Path,
        coordinator: Coordinator,
        *,
        seen: list[str] | None = None,
        meta: RunMeta = META,
        replay_bytes: int = 0,
        **options: Any,
    ) -> Server:
        log = DurableLog.create(
            root, meta, coordinator, make_adapter(), replay_bytes=replay_bytes, **options
        )
        server = cls(log, log.coordinator.initial_state(make_adapter()), [], seen=seen)
        server.meet()
        return server

    @classmethod
    def restart(
        cls, root: Path, coordinator: Coordinator, *, replay_bytes: int = 0, **options: Any
    ) -> Server:
        log = DurableLog(root, coordinator, replay_bytes=replay_bytes)
        recovered = log.recover(**options)
        server = cls(log, recovered.state, list(recovered.instructions), recovered.time_s)
        if not recovered.state.started:
            server.meet()
        return server

    def meet(self) -> None:
        known = self.state.clients
        joins = [ClientJoined(0.0, client_id) for client_id in range(CLIENTS)]
        self.take([*(join for join in joins if join.client_id not in known), RunStarted(0.0)])

    def take(self, events: list[Event]) -> None:
        """Handle events, wait for the disk once, then act."""
        for event in events:
            self.state, instructions = self.log.coordinator.handle(self.state, event)
            self.log.record(event, instructions)
            self.to_do.extend(instructions)
            self.handled += 1
            if self.seen is not None:
                self.seen.append(fingerprint(self.state, self.log.coordinator))
        self.log.sync()
        self.acknowledged.extend(e.update.task_id for e in events if isinstance(e, UpdateArrived))

    def step(self) -> bool:
        """Carry out everything there is to do; return whether the run goes on."""
        self.time_s += 1.0
        answers: list[Event] = []
        later: list[Instruction] = []
        for instruction in self.to_do:
            match instruction:
                case Dispatch(task, _) if not self.log.holds_upload(task.task_id, task.client_id):
                    exchange = self.log.coordinator.exchange
                    answers.append(answer(instruction, self.time_s, exchange))
                case Evaluate(version, _):
                    answers.append(EvaluationFinished(self.time_s, version, 2.0 / (1 + version)))
                case SetTimer(at_s) if at_s <= self.time_s:
                    answers.append(TimerFired(self.time_s))
                case SetTimer():
                    later.append(instruction)
                case Stop():
                    return False
        self.to_do = later
        self.take(answers)
        return True

    def checkpoint(self) -> None:
        self.log.checkpoint(self.state)


def fingerprint(state: CoordinatorState, coordinator: Coordinator) -> str:
    """Equal for equal states, to the last bit."""
    return Codec(rule_state_class(coordinator.rule)).encode(state).text


# --- what child processes run; they die by their own or their parent's signal 9 ---------------


def serve_until_killed(root: Path, seed: int, connection: Connection) -> None:
    """Begin or go on, telling the parent of every acknowledged task, until killed."""
    torch.set_num_threads(1)
    scripted.forget_power_cuts()
    coordinator = make_coordinator()
    begin = Server.restart if (root / "journal.sqlite").exists() else Server.begin
    server = begin(root, coordinator)
    draw = random.Random(seed)
    connection.send(("recovered", server.log.meta["seed"]))
    told = 0
    while True:
        server.step()
        for task_id in server.acknowledged[told:]:
            connection.send(("acknowledged", task_id))
        told = len(server.acknowledged)
        if draw.random() < 0.2:
            server.checkpoint()


def die_at(root: Path, action: str, calls: int, connection: Connection) -> None:
    """Serve a while, then die after so many calls inside one action."""
    torch.set_num_threads(1)
    scripted.forget_power_cuts()
    coordinator = make_coordinator()
    if action == "create":
        made = scripted.die_after(calls, lambda: Server.begin(root, coordinator))
        connection.send(made)
        return
    server = Server.begin(root, coordinator)
    for _ in range(6):
        server.step()
    server.checkpoint()
    for _ in range(3):
        server.step()
    act = {"take": server.step, "checkpoint": server.checkpoint}
    if action == "recover":
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        server.log.close()
        act["recover"] = lambda: Server.restart(root, coordinator)
    connection.send(scripted.die_after(calls, act[action]))

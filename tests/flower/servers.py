"""A real coordinator and a real record behind a scripted grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignfed.core.adapter import Adapter
from alignfed.core.aggregation.fedbuff import FedBuff
from alignfed.core.coordinator import Coordinator
from alignfed.core.instructions import Evaluate
from alignfed.core.lora.exchange import WHOLE, Exchange
from alignfed.core.lora.factor import FactorMean
from alignfed.core.ports import AggregationRule, Evaluation
from alignfed.core.state import CoordinatorSettings, StopConditions
from alignfed.flower.dialect import AlignFedDialect
from alignfed.flower.driver import Driver, DriverParts, DriverSettings, Recovery
from alignfed.flower.messages import Encoding
from alignfed.journal import RunMeta, RunReader
from alignfed.journal.durable import DurableLog
from tests.core.adapters import make_adapter
from tests.flower.grids import Clock, Everybody, FakeDevice, ScriptedGrid


def evaluate(asked: Evaluate) -> Evaluation:
    """Score an adapter by its first element."""
    (buffer,) = asked.adapter.buffers.values()
    return Evaluation(1.0 - float(buffer[0]), None, 1)


@dataclass
class Server:
    """What a test holds in its hands."""

    root: Path
    clock: Clock
    grid: ScriptedGrid
    members: Everybody
    driver: Driver
    log: DurableLog
    devices: dict[int, FakeDevice] = field(default_factory=dict)

    def run(self) -> RunReader:
        """Run to the end and return what is on record."""
        self.driver.run()
        self.log.checkpoint(self.driver.state)
        self.log.close()
        return RunReader(self.root)

    def run_for(self, seconds: float) -> None:
        """Run so long, or to the end."""
        until_s = self.clock.now_s + seconds
        while self.clock.now_s < until_s and self.driver.step():
            self.clock.sleep(self.driver.parts.settings.poll_s)

    def kill(self) -> None:
        """Leave the record as after kill -9: neither commit nor checkpoint."""
        journal = self.log._journal
        journal.database.close()
        journal._metrics.close()
        journal._lock.release()


def make_coordinator(
    *,
    uploads: int,
    concurrency: int,
    buffer_size: int = 2,
    rule: AggregationRule | None = None,
    exchange: Exchange = WHOLE,
    **settings: Any,
) -> Coordinator:
    """Return a coordinator that stops after so many uploads."""
    stop = StopConditions(max_uploads=uploads)
    return Coordinator(
        CoordinatorSettings(concurrency, buffer_size, stop=stop, **settings),
        rule or FedBuff(),
        FactorMean(),
        exchange=exchange,
    )


def serve(
    root: Path,
    devices: int | dict[int, FakeDevice],
    coordinator: Coordinator,
    *,
    clock: Clock | None = None,
    grid: ScriptedGrid | None = None,
    settings: DriverSettings | None = None,
    adapter: Adapter | None = None,
    encoding: Encoding = "fp32",
) -> Server:
    """Return a server that is about to begin, or, where ``root`` holds a run, to go on."""
    clock = clock or Clock()
    if isinstance(devices, int):
        devices = {100 + i: FakeDevice(takes_s=5.0 + i) for i in range(devices)}
    grid = grid or ScriptedGrid(clock, devices)
    adapter = make_adapter() if adapter is None else adapter
    recovery = None
    if (root / "journal.sqlite").exists():
        log = DurableLog(root, coordinator)
        found = log.recover()
        state = found.state
        evaluations = tuple(one for one in found.instructions if isinstance(one, Evaluate))
        recovery = Recovery(found.time_s, evaluations)
    else:
        log = DurableLog.create(root, RunMeta("test", "sha", 0, "{}"), coordinator, adapter)
        state = log.coordinator.initial_state(adapter)
    members = Everybody()
    parts = DriverParts(
        coordinator=log.coordinator,
        grid=grid,
        log=log,
        dialect=AlignFedDialect("run", "digest", encoding, coordinator.exchange),
        members=members,
        clock=clock,
        sleep=clock.sleep,
        evaluate=evaluate,
        settings=settings or DriverSettings(start_clients=len(devices)),
    )
    driver = Driver(parts, state, "run", recovery)
    return Server(root, clock, grid, members, driver, log, devices)


__all__ = ["Server", "evaluate", "make_coordinator", "serve"]

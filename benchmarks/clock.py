"""What the clock, the coordinator and the journal cost when clients cost nothing.

    python benchmarks/clock.py [--events 1000000] [--clients 100000] [--repeats 5] [--cohort 64]

A trainer that computes nothing answers every task with one and the same small adapter; FedBuff
judges, adds and applies it as it would any other. Tasks are handed to the trainer in cohorts, as a
simulation does; with ``--cohort 1`` each is computed alone. Every event counts that the coordinator
handles.
The whole of a run is timed, the joining of all clients included; the fleet is made beforehand.
Each figure is the median over fresh runs. With the journal it is the real one, on disk in a
temporary directory, checksums on, and its closing is part of the time.
"""

from __future__ import annotations

import argparse
import gc
import math
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import peak_rss_bytes, publish, spread

from alignfed.core.adapter import Adapter, LoraFactors
from alignfed.core.aggregation import make_rule
from alignfed.core.coordinator import Coordinator
from alignfed.core.lora import make_lora_rule
from alignfed.core.ports import Journal, TaskWork, TrainingJob, TrainingResult
from alignfed.core.state import CoordinatorSettings, StopConditions
from alignfed.core.update import Task
from alignfed.journal import RunMeta, SqliteJournal
from alignfed.simulation.conditions import GeneratedConditions, Variation
from alignfed.simulation.cost import ServerProfile
from alignfed.simulation.devices import Device, DeviceTable
from alignfed.simulation.draws import exponential, stream_key
from alignfed.simulation.engine import Engine, EngineParts
from alignfed.simulation.fleet import Fleet


class NoTraining:
    """Answers every task at once with the same adapter, or with the one the task brought."""

    def __init__(self, answer: Adapter | None) -> None:
        self._work = TaskWork(1000, 1e6)
        self._answer = answer and TrainingResult(answer, 8, {"loss": 1.0})

    def work(self, task: Task) -> TaskWork:
        return self._work

    def train(self, jobs: Sequence[TrainingJob]) -> list[TrainingResult]:
        if self._answer is not None:
            return [self._answer] * len(jobs)
        return [TrainingResult(job.adapter, 8, {"loss": 1.0}) for job in jobs]


def small_adapter(seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
    return Adapter.pack({"q": LoraFactors(a, b, 4.0)})


def make_fleet(clients: int, seed: int = 1) -> Fleet:
    key = stream_key(seed, "speed")
    devices = DeviceTable(
        Device(i, "any", 1e9 * (0.05 + exponential(key, i)), 1.0, 1e9, 1e5, 1e5)
        for i in range(clients)
    )
    return Fleet(devices, GeneratedConditions(seed, Variation()))


def make_engine(
    fleet: Fleet, events: int, options: argparse.Namespace, journal: Journal | None
) -> Engine:
    clients = len(fleet)
    stop = StopConditions(max_uploads=max(1, events - clients - 1))
    settings = CoordinatorSettings(
        concurrency=min(options.concurrency, clients), buffer_size=options.buffer, stop=stop
    )
    answer = None if options.unchanged else small_adapter(2)
    parts = EngineParts(
        coordinator=Coordinator(settings, make_rule("fedbuff"), make_lora_rule("factor")),
        trainer=NoTraining(answer),
        fleet=fleet,
        server=ServerProfile(),
        clients=range(clients),
        journal=journal,
        cohort_size=options.cohort,
    )
    return Engine(parts, small_adapter(1))


def seconds(fleet: Fleet, events: int, options: argparse.Namespace, *, journalled: bool) -> float:
    """Run so many events and return how long it took."""
    gc.collect()
    if not journalled:
        begun_s = time.perf_counter()
        engine = make_engine(fleet, events, options, None)
        engine.run()
    else:
        with tempfile.TemporaryDirectory() as directory:
            meta = RunMeta("0", "0" * 64, 1)
            journal = SqliteJournal.create(Path(directory) / "run", meta)
            begun_s = time.perf_counter()
            engine = make_engine(fleet, events, options, journal)
            engine.run()
            journal.close()
            return time.perf_counter() - begun_s
    taken_s = time.perf_counter() - begun_s
    if not engine.finished:
        raise RuntimeError("the run did not reach its end")
    return taken_s


def idle_bytes(options: argparse.Namespace) -> float:
    """Return the Python memory of one more client that waits: its device is part of it."""
    totals = []
    for clients in (options.clients // 10, options.clients):
        gc.collect()
        tracemalloc.start()
        fleet = make_fleet(clients)
        engine = make_engine(fleet, clients + 100, options, None)
        while not engine.state.coordinator.started:
            engine.step()
        gc.collect()
        totals.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        del engine, fleet
    return (totals[1] - totals[0]) / (options.clients - options.clients // 10)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the exponent p of ``y = c x^p`` that fits best in logarithms."""
    xs = [math.log(x) for x, _ in points]
    ys = [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    across = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return across / sum((x - mean_x) ** 2 for x in xs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--concurrency", type=int, default=1_000)
    parser.add_argument("--buffer", type=int, default=100)
    parser.add_argument("--cohort", type=int, default=64, help="tasks computed together at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--unchanged", action="store_true", help="clients send back the adapter they were given"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    curve: dict[int, dict[str, Any]] = {}
    for clients in sorted({options.clients // 100, options.clients // 10, options.clients}):
        fleet = make_fleet(clients)
        events = clients * options.events // options.clients
        times = [seconds(fleet, events, options, journalled=False) for _ in range(options.repeats)]
        curve[clients] = {"events": events, "seconds": spread(times)}
        print(f"{clients:,} clients, {events:,} events: {curve[clients]['seconds']['median']:.3f}s")
    plain = [options.events / taken for taken in times]
    print("events/s:", ", ".join(f"{rate:,.0f}" for rate in plain))
    # Last: the disk is still busy with a journal for a while after it was closed.
    journalled = []
    for repeat in range(options.repeats):
        journalled.append(options.events / seconds(fleet, options.events, options, journalled=True))
        print(f"{repeat + 1}: journalled {journalled[-1]:,.0f} events/s")
    points = [(clients, row["seconds"]["median"]) for clients, row in curve.items()]
    publish(
        "clock",
        {
            "clients": options.clients,
            "events": options.events,
            "cohort": options.cohort,
            "answer": "the task's own adapter" if options.unchanged else "one shared adapter",
            "events_per_s": spread(plain)["median"],
            "events_per_s_spread": spread(plain),
            "events_per_s_journalled": spread(journalled)["median"],
            "events_per_s_journalled_spread": spread(journalled),
            "bytes_per_idle_client": idle_bytes(options),
            "exponent": slope(points),
            "curve": curve,
            "peak_rss_bytes": peak_rss_bytes(),
        },
    )


if __name__ == "__main__":
    main()

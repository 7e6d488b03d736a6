"""How much of a default run is neither client training nor evaluation.

    python benchmarks/overhead.py [--repeats 5] [--set key=value]...

The built-in default runs as `alignfed simulate` runs it: journal and checkpoints on disk, training
in worker processes beside the run. What counts is the time from the first dispatch to the last
flush; calibration and alignment are overhead.

Where training goes on beside the run, elapsed time does not add up, processor time does. So
`share_outside_training` is the overhead's share of the processor seconds that the run and its
workers used: all of the run's own process but for training and evaluation done in it, over all.
Workers have loaded the base before the count begins. Beside it stands `share_of_elapsed`: of the
seconds on the wall, those in which nobody trained and nothing was evaluated.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from measure import publish, spread

from alignfed import api
from alignfed.build import Simulation, build_simulation
from alignfed.config import Recipe
from alignfed.core.adapter import Adapter
from alignfed.core.ports import (
    Calibrator,
    ClientTrainer,
    Evaluation,
    TaskWork,
    TrainingJob,
    TrainingResult,
)
from alignfed.core.update import Task
from alignfed.training.worker_pool import PoolTrainer, Share

IDLE_S = 0.01
"""Processor seconds in half a second below which a process counts as idle."""


def children_s() -> dict[int, float]:
    """Return the processor seconds of each process below this one."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found[child.pid] = sum(child.cpu_times()[:2])
    return found


def settle() -> None:
    """Wait until the processes below this one have nothing to do."""
    used = -1.0
    while (now_s := sum(children_s().values())) - used > IDLE_S:
        used = now_s
        time.sleep(0.5)


@dataclass(frozen=True)
class Moment:
    """Elapsed seconds, this process's processor seconds, and those of each process below it."""

    elapsed_s: float
    used_s: float
    children_s: dict[int, float]


def now() -> Moment:
    return Moment(time.perf_counter(), time.process_time(), children_s())


@dataclass
class Stopwatch:
    """Seconds by what they were spent on, between the first dispatch and the last flush.

    Attributes:
        begun: the first dispatch.
        flushed: the last flush.
        evaluated_s: processor seconds of evaluations before it.
        worked_s: ``busy_s`` at the last flush.
        used_s: by name, of this process's processor time.
        calls: by name.
        under_way: training passes given to workers and not finished, and evaluations.
        busy_s: elapsed seconds in which at least one of them was under way.
    """

    begun: Moment | None = None
    flushed: Moment | None = None
    evaluated_s: float = 0.0
    worked_s: float = 0.0
    used_s: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    under_way: int = 0
    busy_s: float = 0.0
    _since_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        """Note the first dispatch."""
        if self.begun is None:
            settle()
            self.begun, self.busy_s = now(), 0.0

    def flush(self) -> None:
        """Note where things stand at a flush."""
        self.passes(0)
        self.flushed, self.worked_s = now(), self.busy_s
        self.evaluated_s = self.used_s.get("evaluation", 0.0)

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Count what happens within, once the first dispatch is over."""
        used_s = time.process_time()
        yield
        if self.begun is None:  # version 0 is scored before the first dispatch
            return
        self.used_s[name] = self.used_s.get(name, 0.0) + time.process_time() - used_s
        self.calls[name] = self.calls.get(name, 0) + 1

    def passes(self, more: int) -> None:
        """Note that one begins (1) or ends (-1); workers' threads call it too."""
        with self._lock:
            at_s = time.perf_counter()
            if self.under_way:
                self.busy_s += at_s - self._since_s
            self.under_way += more
            self._since_s = at_s


@dataclass(frozen=True)
class TimedTrainer:
    trainer: ClientTrainer
    watch: Stopwatch

    def work(self, task: Task) -> TaskWork:
        self.watch.begin()
        return self.trainer.work(task)

    def train(self, jobs: Sequence[TrainingJob]) -> Sequence[TrainingResult]:
        self.watch.passes(1)
        with self.watch.timing("training"):
            found = self.trainer.train(jobs)
        self.watch.passes(-1)
        return found


@dataclass(frozen=True)
class TimedPool(TimedTrainer):
    """The same for workers, with all that an engine asks of them."""

    trainer: PoolTrainer

    def submit(self, jobs: Sequence[TrainingJob]) -> Share:
        self.watch.passes(1)
        share = self.trainer.submit(jobs)
        share.future.add_done_callback(lambda _: self.watch.passes(-1))
        return share

    def take_notes(self) -> tuple[str, ...]:
        return self.trainer.take_notes()

    def close(self) -> None:
        self.trainer.close()


@dataclass(frozen=True)
class TimedCalibrator:
    calibrator: Calibrator
    watch: Stopwatch

    @property
    def tokens(self) -> int:
        return self.calibrator.tokens

    def loss(self, adapter: Adapter) -> float:
        with self.watch.timing("calibration"):
            return self.calibrator.loss(adapter)

    def inputs(self, adapter: Adapter) -> Mapping[str, torch.Tensor]:
        with self.watch.timing("calibration"):
            return self.calibrator.inputs(adapter)

    def features(self, adapter: Adapter) -> torch.Tensor:
        with self.watch.timing("calibration"):
            return self.calibrator.features(adapter)


def timed(simulation: Simulation, watch: Stopwatch) -> Simulation:
    """Return the simulation with a stopwatch around what it computes."""
    parts = simulation.parts
    evaluate, calibrator = parts.evaluate, parts.coordinator.calibrator
    assert evaluate is not None

    def timed_evaluate(adapter: Adapter) -> Evaluation:
        # A run ends with an evaluation of what its last flush made.
        watch.flush()
        watch.passes(1)
        with watch.timing("evaluation"):
            found = evaluate(adapter)
        watch.passes(-1)
        return found

    if calibrator is not None:
        parts = replace(
            parts,
            coordinator=replace(parts.coordinator, calibrator=TimedCalibrator(calibrator, watch)),
        )
    pooled = isinstance(parts.trainer, PoolTrainer)
    trainer = (TimedPool if pooled else TimedTrainer)(parts.trainer, watch)
    parts = replace(parts, trainer=trainer, evaluate=timed_evaluate)
    return replace(simulation, parts=parts)


def run(overrides: Sequence[str]) -> dict[str, Any]:
    """Run the default once; return seconds and the share."""
    watch = Stopwatch()

    def build(recipe: Recipe) -> Simulation:
        return timed(build_simulation(recipe), watch)

    with tempfile.TemporaryDirectory() as directory:
        result = api.simulate(None, Path(directory) / "run", overrides=overrides, build=build)
    begun, flushed = watch.begun, watch.flushed
    assert begun is not None and flushed is not None
    whole_s, own_s = flushed.elapsed_s - begun.elapsed_s, flushed.used_s - begun.used_s
    workers_s = sum(s - begun.children_s.get(pid, 0.0) for pid, s in flushed.children_s.items())
    evaluation_s = watch.evaluated_s
    training_used_s = watch.used_s.get("training", 0.0)
    overhead_s = own_s - training_used_s - evaluation_s
    calibration_s = watch.used_s.get("calibration", 0.0)
    return {
        "share_outside_training": overhead_s / (own_s + workers_s),
        "share_of_elapsed": (whole_s - watch.worked_s) / whole_s,
        "elapsed_s": whole_s,
        "training_s": workers_s + training_used_s,
        "evaluation_s": evaluation_s,
        "calibration_s": calibration_s,
        "rest_s": overhead_s - calibration_s,
        "calls": dict(watch.calls),
        "uploads": result.summary["uploads"],
        "server_version": result.summary["server_version"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args()
    runs = []
    for _ in range(options.repeats):
        runs.append(run(options.overrides))
        print(runs[-1])
    seconds = [name for name in runs[0] if name.endswith("_s")]
    publish(
        "overhead",
        {
            "share_outside_training": median(r["share_outside_training"] for r in runs),
            "share_outside_training_spread": spread([r["share_outside_training"] for r in runs]),
            "share_of_elapsed": spread([r["share_of_elapsed"] for r in runs]),
            **{name: spread([r[name] for r in runs]) for name in seconds},
            "calls": runs[0]["calls"],
            "uploads": runs[0]["uploads"],
            "server_version": runs[0]["server_version"],
            "overrides": options.overrides,
        },
    )


if __name__ == "__main__":
    main()

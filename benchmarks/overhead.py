"""How much of a default run is neither client training nor evaluation.

    python benchmarks/overhead.py [--repeats 5] [--set key=value]...

The built-in default runs as `alignfed simulate` runs it, journal and checkpoints on disk, with a
stopwatch around the trainer, the evaluation of versions and the calibration set. What counts is
the time from the first dispatch to the last flush; calibration and alignment are overhead.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

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


@dataclass
class Stopwatch:
    """Seconds by what they were spent on, between the first dispatch and the last flush."""

    begun_s: float = 0.0
    flushed_s: float = 0.0
    spent_s: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, begun_s: float) -> None:
        if not self.begun_s:  # version 0 is scored before the first dispatch
            return
        self.spent_s[name] = self.spent_s.get(name, 0.0) + time.perf_counter() - begun_s
        self.calls[name] = self.calls.get(name, 0) + 1


@dataclass(frozen=True)
class TimedTrainer:
    trainer: ClientTrainer
    watch: Stopwatch

    def work(self, task: Task) -> TaskWork:
        self.watch.begun_s = self.watch.begun_s or time.perf_counter()
        return self.trainer.work(task)

    def train(self, jobs: Sequence[TrainingJob]) -> Sequence[TrainingResult]:
        begun_s = time.perf_counter()
        found = self.trainer.train(jobs)
        self.watch.add("training", begun_s)
        return found


@dataclass(frozen=True)
class TimedCalibrator:
    calibrator: Calibrator
    watch: Stopwatch

    @property
    def tokens(self) -> int:
        return self.calibrator.tokens

    def loss(self, adapter: Adapter) -> float:
        begun_s = time.perf_counter()
        found = self.calibrator.loss(adapter)
        self.watch.add("calibration", begun_s)
        return found

    def inputs(self, adapter: Adapter) -> Mapping[str, torch.Tensor]:
        begun_s = time.perf_counter()
        found = self.calibrator.inputs(adapter)
        self.watch.add("calibration", begun_s)
        return found

    def features(self, adapter: Adapter) -> torch.Tensor:
        begun_s = time.perf_counter()
        found = self.calibrator.features(adapter)
        self.watch.add("calibration", begun_s)
        return found


def timed(simulation: Simulation, watch: Stopwatch) -> Simulation:
    """Return the simulation with a stopwatch around what it computes."""
    parts = simulation.parts
    evaluate, calibrator = parts.evaluate, parts.coordinator.calibrator
    assert evaluate is not None

    def timed_evaluate(adapter: Adapter) -> Evaluation:
        # A run ends with an evaluation of what its last flush made.
        watch.flushed_s = begun_s = time.perf_counter()
        found = evaluate(adapter)
        watch.add("evaluation", begun_s)
        watch.spent_s["last evaluation"] = time.perf_counter() - begun_s
        return found

    if calibrator is not None:
        parts = replace(
            parts,
            coordinator=replace(parts.coordinator, calibrator=TimedCalibrator(calibrator, watch)),
        )
    parts = replace(parts, trainer=TimedTrainer(parts.trainer, watch), evaluate=timed_evaluate)
    return replace(simulation, parts=parts)


def run(overrides: Sequence[str]) -> dict[str, Any]:
    """Run the default once; return seconds and the share."""
    watch = Stopwatch()

    def build(recipe: Recipe) -> Simulation:
        return timed(build_simulation(recipe), watch)

    with tempfile.TemporaryDirectory() as directory:
        result = api.simulate(None, Path(directory) / "run", overrides=overrides, build=build)
    whole_s = watch.flushed_s - watch.begun_s
    evaluation_s = watch.spent_s["evaluation"] - watch.spent_s["last evaluation"]
    training_s = watch.spent_s["training"]
    calibration_s = watch.spent_s.get("calibration", 0.0)
    outside_s = whole_s - training_s - evaluation_s
    return {
        "share_outside_training": outside_s / whole_s,
        "whole_s": whole_s,
        "training_s": training_s,
        "evaluation_s": evaluation_s,
        "calibration_s": calibration_s,
        "rest_s": outside_s - calibration_s,
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
            **{name: spread([r[name] for r in runs]) for name in seconds},
            "calls": runs[0]["calls"],
            "uploads": runs[0]["uploads"],
            "server_version": runs[0]["server_version"],
            "overrides": options.overrides,
        },
    )


if __name__ == "__main__":
    main()

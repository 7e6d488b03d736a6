"""One worker's bench: it carries out orders, and keeps the model and data of its last environment.

Everything in here runs in a worker process; what an order leaves is in files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from alignfed import api
from alignfed.build import Loaded, Simulation, assemble, load
from alignfed.config import Recipe, make_recipe
from alignfed.core.update import Task
from alignfed.errors import JournalError
from alignfed.journal import RunDirectory, write_summary, write_text_atomically
from alignfed.progress import Limits, RunInfo, RunSnapshot, SilentView, fraction_done
from alignfed.reference import synchronous_reference
from alignfed.simulation.engine import Engine
from alignfed.simulation.trace import record_trace
from alignfed.study.measures import slowest_tenth
from alignfed.study.record import read_record, write_record

DEVICES = "devices.jsonl"
"""The recorded device trace, in an environment's folder."""

FACTS = "environment.json"
"""``EnvironmentFacts``, in an environment's folder."""

RECORD = "record.json"
"""``RunRecord``, in a run's folder; its presence says that the run is finished."""

Report = Callable[[float], None]
"""Told now and then which share of an order is done."""


@dataclass(frozen=True, slots=True)
class EnvironmentFacts:
    """What a study must know of an environment before it can plan its runs.

    Attributes:
        tokens_per_upload: mean over clients of the tokens of their first task.
        client_ids: every client.
        slow_clients: the tenth whose tasks take longest at their devices' stated speeds.
        devices_sha256: SHA-256 of the device trace.
    """

    tokens_per_upload: float
    client_ids: tuple[int, ...]
    slow_clients: tuple[int, ...]
    devices_sha256: str


@dataclass(frozen=True, slots=True)
class Order:
    """Something for a worker to do; plain values, because it travels between processes.

    Attributes:
        kind: prepare an environment, or do a run.
        key: its name within the study.
        environment: key of the environment whose model and data it needs.
        recipe: the recipe as TOML.
        root: folder for what it leaves.
        digest: what the result is a result of.
        client_ids: of a run, every client.
    """

    kind: Literal["environment", "run"]
    key: str
    environment: str
    recipe: str
    root: Path
    digest: str
    client_ids: tuple[int, ...] = ()


class Bench:
    """Carries out one order after another."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._held: tuple[str, Loaded] | None = None

    def carry_out(self, order: Order, report: Report) -> None:
        """Do what the order says; when this returns, its files are complete.

        Raises:
            AlignFedError: the recipe asks for what does not exist or does not fit.
            KeyboardInterrupt: interrupted; the same order goes on from there.
        """
        recipe = _in_this_process(make_recipe(tomllib.loads(order.recipe)))
        if order.kind == "environment":
            prepare(self._build(order.environment, recipe), order)
        else:
            self._run(order, recipe, report)

    def _run(self, order: Order, recipe: Recipe, report: Report) -> None:
        place = RunDirectory(order.root)

        def build(wanted: Recipe) -> Simulation:
            return self._build(order.environment, wanted)

        begun = place.holds_run() and place.recipe.exists()
        if begun and place.recipe.read_text(encoding="utf-8") == recipe.to_toml():
            api.resume(order.root, view=ShareView(report), build=build)
        else:
            if order.root.exists():  # another recipe's, or not even begun
                shutil.rmtree(order.root)
            api.simulate(recipe, order.root, view=ShareView(report), build=build)
        write_record(order.root / RECORD, read_record(order.root, order.client_ids), order.digest)

    def _build(self, environment: str, recipe: Recipe) -> Simulation:
        if self._held is None or self._held[0] != environment:
            self._held = None  # two models at once might not fit
            self._held = (environment, load(recipe))
        return assemble(self._held[1], recipe)


def _in_this_process(recipe: Recipe) -> Recipe:
    """Return the recipe with its training in this process, one thread: other cores have theirs."""
    here = {"workers": 1, "threads": 1, "workers_on": "processes", "ray_address": None}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=here)})


class ShareView(SilentView):
    """Turns a run's progress into a share of the whole."""

    def __init__(self, report: Report) -> None:
        """Tell ``report``."""
        self._report = report
        self._limits = Limits()

    def started(self, info: RunInfo) -> None:
        """Remember when the run ends."""
        self._limits = info.limits

    def progress(self, snapshot: RunSnapshot) -> None:
        """Tell the share that is done."""
        self._report(fraction_done(self._limits, snapshot) or 0.0)


def prepare(simulation: Simulation, order: Order) -> None:
    """Record an environment's devices and what the study must know of it.

    The trace lasts as long as a synchronous FedAvg of as many uploads, which nothing outlasts; past
    its end it begins again, for every rule alike.
    """
    recipe, data = simulation.recipe, simulation.data
    assert recipe.stop.uploads is not None  # the study was planned
    engine = Engine(
        synchronous_reference(simulation, recipe.stop.uploads), simulation.initial_adapter
    )
    horizon_s = max(engine.run().now_s, 1.0)
    text = record_trace(simulation.fleet, horizon_s)
    table = simulation.fleet.devices
    size_bytes = simulation.initial_adapter.layout.size_bytes
    tokens, times_s = [], {}
    for client_id in data.clients:
        work = simulation.parts.trainer.work(Task(0, client_id, 0, 0))
        tokens.append(work.tokens)
        times_s[client_id] = (
            work.tokens * work.flops_per_token * table.seconds_per_flop[client_id]
            + size_bytes * table.seconds_per_byte_down[client_id]
            + size_bytes * table.seconds_per_byte_up[client_id]
        )
    facts = EnvironmentFacts(
        sum(tokens) / len(tokens),
        tuple(data.clients),
        tuple(slowest_tenth(times_s)),
        hashlib.sha256(text.encode()).hexdigest(),
    )
    order.root.mkdir(parents=True, exist_ok=True)
    write_text_atomically(order.root / DEVICES, text)
    write_summary(order.root / FACTS, {"digest": order.digest, **asdict(facts)})


def load_facts(path: Path, digest: str) -> EnvironmentFacts | None:
    """Return an environment's facts, or None where there are none of that digest.

    Raises:
        JournalError: the file holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("digest") != digest:
            return None
        return EnvironmentFacts(
            found["tokens_per_upload"],
            tuple(found["client_ids"]),
            tuple(found["slow_clients"]),
            found["devices_sha256"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise JournalError(
            f"{path} does not describe an environment: {error!r}; delete it, and it is made again",
            path=str(path),
        ) from error

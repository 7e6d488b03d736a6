"""A whole secured federation on one machine: real processes, TLS and node keys on loopback.

The run's files lie where a simulated run's would; keys, devices and logs in ``deployment`` beside
them. Started again after an interruption it goes on where it was.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignfed.config import Recipe, load_recipe, make_recipe
from alignfed.deploy.creating import add_device, create_server
from alignfed.deploy.directory import DeviceDirectory, ServerDirectory
from alignfed.deploy.loglines import BoundedLog
from alignfed.deploy.processes import CLIENT, SUPERNODE, TRAINER, device_programs
from alignfed.deploy.records import read_json, records_to
from alignfed.deploy.registry import load_registry
from alignfed.deploy.server import ServerHost
from alignfed.deploy.settings import (
    ServerSettings,
    load_device_settings,
    load_server_settings,
    make_settings,
)
from alignfed.deploy.thin_app import write_app
from alignfed.errors import DeploymentError
from alignfed.journal import RunDirectory, write_summary
from alignfed.planning import make_plan
from alignfed.progress import Limits, ProgressView, RunInfo, RunSnapshot

DEPLOYMENT = "deployment"
LOOK_EVERY_S = 0.5
TRAINER_STARTS = 4
"""Starts of a trainer, without a model loaded once, after which it is given up."""


@dataclass(frozen=True, slots=True)
class UpResult:
    """A federation's end.

    Attributes:
        directory: the run's directory.
        summary: the content of ``summary.json``; None where the run was interrupted.
    """

    directory: Path
    summary: Mapping[str, Any] | None


def recipe_for(recipe: Recipe, devices: int) -> Recipe:
    """Return a recipe cut to a number of devices, one client each and one task at a time.

    A device trains its task alone, so the recipe says so too: then `alignfed simulate` of the same
    recipe rounds as the devices do.

    Raises:
        RecipeError: it does not fit together then.
    """
    changes = ["training.cohort_size=1", f"data.partition.num_clients={devices}"]
    if recipe.server.concurrency > devices:
        changes.append(f"server.concurrency={devices}")
    return make_recipe(tomllib.loads(recipe.to_toml()), changes)


def run_up(
    recipe: Recipe,
    directory: Path,
    devices: int,
    view: ProgressView,
    stop: threading.Event,
    *,
    encoding: str = "fp32",
    adopts: bool = False,
) -> UpResult:
    """Run a federation until its recipe is done or ``stop`` is set; then no process is left.

    Args:
        recipe: what to train, already cut to the devices (``recipe_for``).
        directory: the run's directory, new or of an interrupted federation.
        devices: how many devices there are; device i is client i.
        view: watches the run.
        stop: set to interrupt.
        encoding: numbers of an adapter on the wire; fp32 changes nothing of what is learned.
        adopts: as ``Supervisor`` has it.

    Raises:
        DeploymentError: the directory holds something else, or processes fail again and again.
    """
    place = RunDirectory(directory)
    server = ServerDirectory(directory / DEPLOYMENT)
    resumed = server.settings.exists()
    if resumed:
        recipe = _known(server, recipe, devices)
    else:
        _make(place, server, recipe, devices, encoding)
    settings = load_server_settings(server.settings)
    summary = _finished(place)
    if summary is not None:
        view.finished(summary)
        return UpResult(directory, summary)
    found = [server.device(device.name) for device in load_registry(server.registry).active]
    view.started(_info(recipe, directory, devices, resumed=resumed))
    host = ServerHost(server, settings, write_app(server.app), give_up_after=2, adopts=adopts)
    log = BoundedLog(server.logs / "supervisor.log", settings.log.bytes, settings.log.files)
    try:
        with records_to(log.write):
            return _go_on(host, server, found, place, view, stop)
    finally:
        log.close()


def _go_on(
    host: ServerHost,
    server: ServerDirectory,
    found: Sequence[DeviceDirectory],
    place: RunDirectory,
    view: ProgressView,
    stop: threading.Event,
) -> UpResult:
    try:
        host.start()
        for device in found:
            device.prepare()
            programs = device_programs(
                device, load_device_settings(device.settings), _prefix(device)
            )
            host.supervisor.start(programs)
        _watch(host, server, found, view, stop)
    finally:
        host.stop(
            [
                [_prefix(device) + SUPERNODE for device in found],
                [_prefix(device) + name for device in found for name in (CLIENT, TRAINER)],
            ]
        )
        for device in found:
            device.forget_socket()
    if not host.completed:
        return UpResult(place.root, None)
    summary = _with_model_loads(place, found)
    view.finished(summary)
    return UpResult(place.root, summary)


def _make(
    place: RunDirectory, server: ServerDirectory, recipe: Recipe, devices: int, encoding: str
) -> None:
    if place.holds_run() or place.summary.exists():
        raise DeploymentError(
            f"{place.root} already holds a run that was not made by alignfed up; choose another"
            " directory",
            path=str(place.root),
        )
    ports = free_ports(2 + devices)
    settings = make_settings(
        ServerSettings,
        "alignfed up",
        {
            "hosts": ["127.0.0.1", "localhost"],
            "bind": "127.0.0.1",
            "port": ports[0],
            "superlink_port": ports[1],
            "metrics_port": 0,
            "run": "..",
            "serving": {"encoding": encoding},
        },
    )
    create_server(server.root, settings, recipe, datetime.datetime.now(datetime.UTC))
    for number in range(devices):
        add_device(
            server,
            settings,
            f"device-{number}",
            client_id=number,
            runtime_port=ports[2 + number],
        )


def _known(server: ServerDirectory, recipe: Recipe, devices: int) -> Recipe:
    """Return the recipe of a federation that was begun here; refuse another one."""
    known = load_recipe(server.recipe)
    number = len(load_registry(server.registry).active)
    if number != devices or known != recipe:
        what = f"{number} devices, not {devices}" if number != devices else "another recipe"
        raise DeploymentError(
            f"{server.root.parent} holds a federation with {what}; go on with the same, or choose"
            " another directory",
            path=str(server.root.parent),
            devices=number,
        )
    return known


def _watch(
    host: ServerHost,
    server: ServerDirectory,
    devices: Sequence[DeviceDirectory],
    view: ProgressView,
    stop: threading.Event,
) -> None:
    looked_s = 0.0
    while not stop.wait(0.2) and host.step():
        if time.monotonic() - looked_s < LOOK_EVERY_S:
            continue
        looked_s = time.monotonic()
        snapshot = _snapshot(read_json(server.status))
        if snapshot is not None:
            view.progress(snapshot)
        for device in devices:
            _check_trainer(host, device)
    snapshot = _snapshot(read_json(server.status))
    if snapshot is not None:
        view.progress(snapshot)


def _check_trainer(host: ServerHost, device: DeviceDirectory) -> None:
    name = _prefix(device) + TRAINER
    running = host.supervisor.running[name]
    if running.restarts >= TRAINER_STARTS and _model_loads(device) == 0:
        raise DeploymentError(
            f"{name} ended {running.restarts} times before it had loaded the model; its last"
            f" lines:\n{host.supervisor.last_words(name)}",
            name=name,
        )


def _snapshot(status: Mapping[str, Any] | None) -> RunSnapshot | None:
    if status is None:
        return None
    return RunSnapshot(
        virtual_time_s=status["time_s"],
        version=status["version"],
        uploads=status["received"],
        rejected=sum(status["rejections"].values()),
        in_flight=status["in_flight"],
        staleness_mean=status["staleness_mean"],
        loss=status["loss"],
        score=status["score"],
    )


def _info(recipe: Recipe, directory: Path, devices: int, *, resumed: bool) -> RunInfo:
    plan = make_plan(recipe)
    stop = recipe.stop
    return RunInfo(
        name=recipe.name,
        directory=directory,
        strategy=recipe.strategy.rule,
        lora=recipe.strategy.lora,
        model=f"{recipe.model.path} model",
        base_parameters=plan.base_parameters,
        adapter_parameters=plan.adapter_parameters,
        fleet=f"{devices} real devices on this machine",
        clients=devices,
        concurrency=recipe.server.concurrency,
        buffer_size=recipe.server.buffer_size,
        limits=Limits(stop.virtual_time_s, stop.uploads, stop.versions, stop.tokens),
        resumed=resumed,
        clock="time",
    )


def _finished(place: RunDirectory) -> dict[str, Any] | None:
    try:
        summary = json.loads(place.summary.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and "model_loads" in summary else None


def _with_model_loads(place: RunDirectory, devices: Sequence[DeviceDirectory]) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(place.summary.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DeploymentError(
            f"the run ended without a whole {place.summary}: {error}; see"
            f" {place.root / DEPLOYMENT / 'logs'}",
            path=str(place.summary),
        ) from error
    summary["model_loads"] = {device.root.name: _model_loads(device) for device in devices}
    write_summary(place.summary, summary)
    return summary


def _model_loads(device: DeviceDirectory) -> int:
    return int((read_json(device.status) or {}).get("model_loads", 0))


def _prefix(device: DeviceDirectory) -> str:
    return device.root.name + "-"


def free_ports(number: int) -> list[int]:
    """Return ports of loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]

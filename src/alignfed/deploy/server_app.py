"""The Flower ServerApp of a deployed server: ``alignfed.deploy.server_app:app``.

It finds the server's directory by the environment (``ALIGNFED_SERVER_DIRECTORY``), where recipe,
settings and registry are. Where the run's directory holds a run, that run goes on, in whatever
Flower run this process belongs to.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from alignfed.config import Recipe, load_recipe
from alignfed.deploy.directory import SERVER_DIRECTORY, ServerDirectory
from alignfed.deploy.loglines import BoundedLog
from alignfed.deploy.records import records_to, write_json
from alignfed.deploy.registry import RegistryView
from alignfed.deploy.serve import Server, serve
from alignfed.deploy.settings import ServerSettings, load_server_settings
from alignfed.deploy.status import status_document
from alignfed.errors import DeploymentError
from alignfed.flower.driver import DriverSettings
from alignfed.flower.pace import PaceSettings
from alignfed.flower.status import ServerStatus
from alignfed.journal import RunDirectory

STATUS_EVERY_S = 2.0
"""Seconds between writings of ``status.json``."""


class _Report:
    """Writes ``status.json`` every few seconds, and at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next_s = 0.0
        self._stopped = False

    def __call__(self, status: ServerStatus) -> None:
        now_s = time.monotonic()
        ended = status.stopped is not None and not self._stopped
        if now_s < self._next_s and not ended:
            return
        self._next_s, self._stopped = now_s + STATUS_EVERY_S, status.stopped is not None
        write_json(self._path, status_document(status, time.time()))


class _Registered:
    """Implements ``Members`` by the registry on disk, so that a revocation holds at once."""

    def __init__(self, view: RegistryView) -> None:
        self._view = view

    def client_of(self, node_id: int) -> int | None:
        return self._view.current().client_of(node_id)

    def client_ids(self) -> list[int]:
        return [device.client_id for device in self._view.current().active]


def server_of(directory: ServerDirectory) -> Server:
    """Return what is served from a deployment's directory.

    Raises:
        AlignFedError: recipe, settings or registry are missing or have problems.
    """
    recipe = load_recipe(directory.recipe, files_exist=False)
    settings = load_server_settings(directory.settings)
    members = _Registered(RegistryView(directory.registry))
    return Server(
        recipe=recipe,
        place=RunDirectory(settings.run_folder(directory.root)),
        members=members,
        client_ids=members.client_ids,
        settings=driver_settings(settings, recipe, len(members.client_ids())),
        encoding=settings.serving.encoding,
        keep_payloads=settings.serving.keep_payloads,
        replay_bytes=settings.serving.replay_bytes,
        report=_Report(directory.status),
    )


def driver_settings(settings: ServerSettings, recipe: Recipe, devices: int) -> DriverSettings:
    """Return the driver's settings; a run starts once there are enough devices to keep busy."""
    return DriverSettings(
        poll_s=settings.serving.poll_s,
        start_clients=max(1, min(recipe.server.concurrency, devices)),
        pace=PaceSettings(first_ttl_s=settings.serving.time_to_live_s),
    )


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the directory that the environment names."""
    root = os.environ.get(SERVER_DIRECTORY)
    if not root:
        raise DeploymentError(
            f"this ServerApp does not know its directory: {SERVER_DIRECTORY} is unset; start it"
            " with `alignfed deploy server`"
        )
    directory = ServerDirectory(Path(root))
    log = load_server_settings(directory.settings).log
    # Flower keeps what this process prints to itself until the run is over.
    lines = BoundedLog(directory.logs / "server_app.log", log.bytes, log.files)
    try:
        with records_to(lines.write):
            serve(grid, server_of(directory))
    finally:
        lines.close()

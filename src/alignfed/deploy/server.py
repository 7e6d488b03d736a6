"""A server at work: its programs, the nodes Flower knows, and the Flower run that is ours.

Flower forgets a run whose ServerApp dies; ours goes on. So whenever the Flower run ends unasked, or
its process is gone, another is started, and the ServerApp takes up our run from its own record.
"""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from alignfed.deploy.control import Control, connected
from alignfed.deploy.directory import ServerDirectory
from alignfed.deploy.loglines import BoundedLog, LogKeeper
from alignfed.deploy.metrics import Endpoint
from alignfed.deploy.processes import PROXY, SUPEREXEC, SUPERLINK, server_programs
from alignfed.deploy.records import log_record, read_json, write_json
from alignfed.deploy.registry import RegistryView, update_registry
from alignfed.deploy.session import marked_processes
from alignfed.deploy.settings import ServerSettings
from alignfed.deploy.supervisor import FIRST_PAUSE_S, LONGEST_PAUSE_S, Supervisor
from alignfed.errors import DeploymentError
from alignfed.journal.lock import DirectoryLock

LOOK_EVERY_S = 1.0
STARTING_S = 60.0
"""How long Flower may take until a ServerApp's process is there."""

_APP_COMMAND = b"flwr-serverapp"
_STOP_ORDER = ((SUPEREXEC,), (SUPERLINK,), (PROXY,))


class ServerHost:
    """Runs a server. Used from one thread."""

    def __init__(
        self,
        directory: ServerDirectory,
        settings: ServerSettings,
        app: Path,
        *,
        give_up_after: int | None = None,
        adopts: bool = False,
    ) -> None:
        """Take the directory's lock.

        Args:
            directory: the server's.
            settings: its settings.
            app: folder of the Flower app to run.
            give_up_after: failures of the ServerApp in a row, each before it served anything, after
                which it is not started again; None: never.
            adopts: as ``Supervisor`` has it.

        Raises:
            JournalError: another process runs this server.
        """
        directory.prepare()
        self._directory = directory
        self._settings = settings
        self._app = app
        self._give_up_after = give_up_after
        self._lock = DirectoryLock(directory.lock)
        logs = LogKeeper(directory.logs, settings.log.bytes, settings.log.files)
        self._app_log = BoundedLog(
            directory.logs / "flower_app.log", settings.log.bytes, settings.log.files
        )
        self.supervisor = Supervisor(logs, directory.processes, adopts=adopts)
        self._registry = RegistryView(directory.registry)
        self._synchronised: object = None
        self._run_id: int | None = None
        self._run_started_s = 0.0
        self._run_began_s = 0.0
        self._app_seen = False
        self._start_again_s = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._failures = 0
        self._looked_s = 0.0
        self._metrics: Endpoint | None = None
        self._reachable = True
        self.completed = False

    def start(self) -> None:
        """Start everything, and wait until devices can be served.

        Raises:
            DeploymentError: a port is taken, or a program does not start.
        """
        settings = self._settings
        _check_free("127.0.0.1", settings.superlink_port, "superlink_port")
        _check_free(settings.bind, settings.port, "port")
        if settings.metrics_port:
            self._metrics = Endpoint(self._directory, settings)
        _compact(self._directory.superlink_database)
        for group in server_programs(self._directory, settings):
            self.supervisor.start(group)
        earlier = read_json(self._run_file)
        with connected(self._directory, settings) as control:
            if earlier is not None:
                with contextlib.suppress(DeploymentError):
                    control.stop_run(int(earlier["run_id"]))
            self._synchronise(control)
            self._start_app(control)

    def step(self) -> bool:
        """Look after everything; return whether there is more to do.

        Raises:
            DeploymentError: the ServerApp fails again and again, where that is not borne.
        """
        self.supervisor.poll()
        now_s = time.monotonic()
        if now_s - self._looked_s < LOOK_EVERY_S:
            return not self.completed
        self._looked_s = now_s
        try:
            with connected(self._directory, self._settings) as control:
                if self._registry.current() != self._synchronised:
                    self._synchronise(control)
                self._look_after_app(control, now_s)
            self._reachable = True
        except DeploymentError as error:
            if self._given_up:
                raise
            # The SuperLink may be starting again; the supervisor sees to that.
            if self._reachable:
                log_record("control_unreachable", detail=str(error))
            self._reachable = False
        return not self.completed

    def run(self, stop: threading.Event) -> None:
        """Go on until ``stop`` is set or our run is complete."""
        while not stop.wait(0.2) and self.step():
            pass

    def stop(self, first: Sequence[Sequence[str]] = ()) -> None:
        """End everything; calling it again changes nothing.

        Args:
            first: programs that end before the server's own, group by group.
        """
        self.supervisor.stop([*first, *_STOP_ORDER])
        self._app_log.close()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        self._lock.release()

    @property
    def _run_file(self) -> Path:
        return self._directory.state / "flower_run.json"

    @property
    def _given_up(self) -> bool:
        return self._give_up_after is not None and self._failures >= self._give_up_after

    def _synchronise(self, control: Control) -> None:
        """Make Flower know whom the registry knows, and nobody else."""
        registry = self._registry.current()
        for device in registry.devices:
            if device.revoked:
                if device.node_id is not None:
                    control.unregister(device.node_id)
                continue
            node_id = control.register(device.public_key)
            if node_id != device.node_id:
                name = device.name
                registry = update_registry(
                    self._directory.registry,
                    lambda present, name=name, node_id=node_id: present.with_node(name, node_id),  # type: ignore[misc]
                )
                log_record("registered", device=name, node_id=node_id)
        self._synchronised = registry

    def _start_app(self, control: Control) -> None:
        self._run_id = control.start_run(self._app, {})
        self._run_started_s = time.monotonic()
        self._run_began_s = time.time()
        self._app_seen = False
        write_json(self._run_file, {"run_id": self._run_id, "time_s": time.time()})
        log_record("flower_run_started", run_id=self._run_id)

    def _look_after_app(self, control: Control, now_s: float) -> None:
        if self._run_id is None:
            if now_s >= self._start_again_s:
                self._start_app(control)
            return
        run = control.run(self._run_id)
        present = self._app_present()
        self._app_seen = self._app_seen or present
        if not run.finished:
            late = now_s - self._run_started_s > STARTING_S
            if present or not (self._app_seen or late):
                return
            # Flower itself would notice only when heartbeats have been missing for a while.
            control.stop_run(self._run_id)
            run = control.run(self._run_id)
        said = control.closing_log(self._run_id)
        self._app_log.write(said.encode("utf-8"))
        if run.outcome == "completed":
            self.completed = True
            return
        self._note_failure(run.details or run.outcome, said, now_s)

    def _note_failure(self, details: str, said: str, now_s: float) -> None:
        idle = not self._has_served()
        self._failures = self._failures + 1 if idle else 0
        self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s) if idle else FIRST_PAUSE_S
        self._start_again_s = now_s + self._pause_s
        log_record(
            "server_app_ended", run_id=self._run_id, details=details, again_in_s=self._pause_s
        )
        self._run_id = None
        if self._given_up:
            words = "\n".join(said.strip().splitlines()[-12:])
            raise DeploymentError(
                f"the ServerApp failed {self._failures} times in a row; its last lines, from"
                f" {self._app_log.path}:\n{words}",
                details=details,
            )

    def _has_served(self) -> bool:
        """Return whether the ServerApp has said anything of itself since it was started."""
        status = read_json(self._directory.status) or {}
        return float(status.get("written_s", 0.0)) > self._run_began_s

    def _app_present(self) -> bool:
        for pid in marked_processes(self.supervisor.mark):
            with contextlib.suppress(OSError):
                if _APP_COMMAND in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return True
        return False


def _check_free(host: str, port: int, name: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DeploymentError(
                f"{host}:{port} cannot be listened on: {error.strerror}; stop what uses it, or"
                f" change {name} in deploy.toml",
                host=host,
                port=port,
            ) from error


def _compact(database: Path) -> None:
    """Give back what Flower's database has freed: payloads pass through it and leave pages behind.

    Only while nobody has it open; a running SuperLink uses freed pages again.
    """
    if not database.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            (free,) = connection.execute("PRAGMA freelist_count").fetchone()
            (every,) = connection.execute("PRAGMA page_count").fetchone()
            if free > every // 2:
                connection.execute("VACUUM")
    except sqlite3.Error as error:
        # Flower says itself what is wrong with its database.
        log_record("not_compacted", detail=str(error))

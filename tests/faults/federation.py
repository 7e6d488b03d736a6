"""A secured federation of real processes, for tests that hurt it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from alignfed.config import Recipe, default_recipe
from alignfed.deploy.control import connected
from alignfed.deploy.creating import add_device, create_server
from alignfed.deploy.directory import DeviceDirectory
from alignfed.deploy.processes import device_programs, supernode_program
from alignfed.deploy.records import read_json
from alignfed.deploy.server import ServerHost
from alignfed.deploy.session import marked_processes
from alignfed.deploy.settings import (
    DeviceSettings,
    ServerSettings,
    load_device_settings,
    make_settings,
)
from alignfed.deploy.supervisor import Program
from alignfed.deploy.thin_app import write_app
from alignfed.deploy.up import free_ports

EVERYTHING = os.environ.get("ALIGNFED_FAULTS") == "all"
"""Whether the long tests run too, as `make faults` has it."""

ECHO = Path(__file__).parent / "echo"
"""A Flower app whose devices give back what they get."""


class Federation:
    """A server and devices, the server looked after by a thread.

    With a recipe it is the real thing: our ServerApp, and trainers that train. Without, the echo
    app stands in for both, which starts in a third of the time.
    """

    def __init__(self, root: Path, devices: int, recipe: Recipe | None = None) -> None:
        ports = free_ports(2 + devices)
        values = {
            "hosts": ["127.0.0.1", "localhost"],
            "bind": "127.0.0.1",
            "port": ports[0],
            "superlink_port": ports[1],
            "metrics_port": 0,
        }
        self.settings = make_settings(ServerSettings, "the test", values)
        now = datetime.datetime.now(datetime.UTC)
        shown = default_recipe() if recipe is None else recipe
        self.directory = create_server(root, self.settings, shown, now)
        self.devices = [
            add_device(self.directory, self.settings, f"d{number}", runtime_port=ports[2 + number])
            for number in range(devices)
        ]
        self.run = self.settings.run_folder(root)
        app = ECHO if recipe is None else write_app(self.directory.app)
        self.host = ServerHost(self.directory, self.settings, app)
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._step)

    def __enter__(self) -> Federation:
        try:
            self.host.start()
        except BaseException:
            self.host.stop()
            raise
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.host.stop([[name for name in self.host.supervisor.running if "supernode" in name]])
        for device in self.devices:
            device.forget_socket()
        assert marked_processes(self.host.supervisor.mark) == []

    def start_supernode(self, number: int, server: str | None = None) -> str:
        """Start a device's SuperNode alone, perhaps against another address; return its name."""
        device, settings = self._device(number, server)
        supernode = supernode_program(device, settings, f"d{number}-", warm=False)
        self._start([supernode])
        return supernode.name

    def start_device(self, number: int, server: str | None = None) -> None:
        """Start all that belongs to a device, perhaps against another address."""
        self._start(self.programs(number, server))

    def programs(self, number: int, server: str | None = None) -> list[Program]:
        """Return trainer, client process and SuperNode of a device."""
        device, settings = self._device(number, server)
        return device_programs(device, settings, f"d{number}-")

    def stop_device(self, number: int) -> None:
        """Stop all that belongs to a device, as if it were switched off."""
        with self._lock:
            names = [name for name in self.host.supervisor.running if name[:3] == f"d{number}-"]
            self.host.supervisor.remove(names, grace_s=1.0)

    def trainer(self, number: int) -> dict[str, Any]:
        """Return what a device's trainer says of itself."""
        return read_json(self.devices[number].status) or {}

    def finished_tasks(self, number: int | None = None) -> set[int]:
        """Return the tasks that a device's trainer, or any, has finished, from the logs."""
        which = "*" if number is None else number
        text = "".join(
            path.read_text() for path in self.directory.logs.glob(f"d{which}-trainer.log*")
        )
        return {int(found) for found in re.findall(r"task (\d+) is finished and kept", text)}

    def status(self) -> dict[str, Any]:
        """Return what the ServerApp says of the run."""
        return read_json(self.directory.status) or {"received": 0, "in_flight": 0, "version": 0}

    def _device(self, number: int, server: str | None) -> tuple[DeviceDirectory, DeviceSettings]:
        device = self.devices[number]
        settings = load_device_settings(device.settings)
        if server is not None:
            settings = settings.model_copy(update={"server": server})
        device.prepare()
        return device, settings

    def _start(self, programs: list[Program]) -> None:
        with self._lock:
            self.host.supervisor.start(programs)

    def running(self, name: str):
        return self.host.supervisor.running[name]

    def log(self, name: str) -> str:
        return self.host.supervisor.last_words(name, 40)

    def kill(self, name: str) -> None:
        """Kill a program that the supervisor started, with no warning."""
        os.kill(self.running(name).process.pid, signal.SIGKILL)

    def kill_app(self) -> None:
        """Kill the ServerApp's process, which Flower started."""
        for pid in marked_processes(self.host.supervisor.mark):
            with contextlib.suppress(OSError):
                if b"flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    def statuses(self) -> dict[int, str]:
        """Return what Flower says of each node."""
        with connected(self.directory, self.settings) as control:
            return {node.node_id: node.status for node in control.nodes()}

    def replies(self) -> list[dict]:
        """Return what came back to the echo app so far."""
        path = self.directory.root / "echo.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _step(self) -> None:
        try:
            while not self._stop.wait(0.2):
                with self._lock:
                    self.host.step()
        except BaseException as error:
            self.failure = error
            raise


def small_recipe(devices: int, *overrides: str) -> Recipe:
    """Return the built-in recipe cut to a few examples, with tasks long enough to be hit."""
    return default_recipe(
        (
            "data.num_examples=400",
            "data.evaluation_examples=24",
            "data.calibration_examples=8",
            "data.held_out_examples=4",
            f"data.partition.num_clients={devices}",
            "data.partition.alpha=5",
            "training.steps=16",
            "training.batch_size=8",
            f"server.concurrency={devices}",
            "server.buffer_size=2",
            "evaluation.every_versions=3",
            "evaluation.scorer=none",
            "compare.target_score=unset",
            *overrides,
        )
    )


def until(condition, within_s: float = 90.0, step_s: float = 0.2) -> None:
    """Wait for something that must happen."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "did not happen in time"
        time.sleep(step_s)


class Cable:
    """A connection between devices and server that can be cut and mended."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._whole = True
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Break every connection and take no more."""
        with self._lock:
            self._whole = False
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
            self._sockets.clear()

    def mend(self) -> None:
        """Take connections again."""
        with self._lock:
            self._whole = True

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if not self._whole:
                    near.close()
                    continue
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                self._sockets |= {near, far}
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            with self._lock:
                for one in (source, sink):
                    self._sockets.discard(one)
                    with contextlib.suppress(OSError):
                        one.shutdown(socket.SHUT_RDWR)
                    one.close()

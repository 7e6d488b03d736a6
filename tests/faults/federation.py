"""A secured federation of real processes, for tests that hurt it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

from alignfed.config import default_recipe
from alignfed.deploy.control import connected
from alignfed.deploy.creating import add_device, create_server
from alignfed.deploy.processes import supernode_program
from alignfed.deploy.server import ServerHost
from alignfed.deploy.session import marked_processes
from alignfed.deploy.settings import ServerSettings, load_device_settings, make_settings
from alignfed.deploy.up import free_ports

ECHO = Path(__file__).parent / "echo"
"""A Flower app whose devices give back what they get."""


class Federation:
    """A server with the echo app and as many devices as wanted, stepped by a thread."""

    def __init__(self, root: Path, devices: int) -> None:
        ports = free_ports(2 + devices)
        values = {
            "hosts": ["127.0.0.1", "localhost"],
            "bind": "127.0.0.1",
            "port": ports[0],
            "superlink_port": ports[1],
            "metrics_port": None,
        }
        self.settings = make_settings(ServerSettings, "the test", values)
        now = datetime.datetime.now(datetime.UTC)
        self.directory = create_server(root, self.settings, default_recipe(), now)
        self.devices = [
            add_device(self.directory, self.settings, f"d{number}", runtime_port=ports[2 + number])
            for number in range(devices)
        ]
        self.host = ServerHost(self.directory, self.settings, ECHO)
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
        self.host.stop()
        assert marked_processes(self.host.supervisor.mark) == []

    def start_supernode(self, number: int, server: str | None = None) -> str:
        """Start a device's SuperNode, perhaps against another address; return its name."""
        device = self.devices[number]
        settings = load_device_settings(device.settings)
        if server is not None:
            settings = settings.model_copy(update={"server": server})
        device.prepare()
        # The echo app travels with its messages, so Flower starts it; our own clients stay.
        supernode = supernode_program(device, settings, f"{device.root.name}-", warm=False)
        with self._lock:
            self.host.supervisor.start([supernode])
        return supernode.name

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
        while not self._stop.wait(0.2):
            with self._lock:
                self.host.step()


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

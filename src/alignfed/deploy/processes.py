"""The programs of a deployment: which commands, with which arguments and environment."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from alignfed.deploy.directory import (
    DEVICE_DIRECTORY,
    SERVER_DIRECTORY,
    DeviceDirectory,
    ServerDirectory,
)
from alignfed.deploy.pki import make_secret, write_secret
from alignfed.deploy.settings import DeviceSettings, ServerSettings
from alignfed.deploy.supervisor import Program
from alignfed.errors import DeploymentError

PROXY = "proxy"
SUPERLINK = "superlink"
SUPEREXEC = "superexec"
SUPERNODE = "supernode"
TRAINER = "trainer"
CLIENT = "client"

GAVE_UP = "SSL/TLS handshake error detected."
"""What Flower 1.41 says of a broken handshake, which it takes for a wrong certificate.

Its SuperNode stops working then, while its process stands. A line that is cut at the wrong moment
looks just so.
"""

_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "PYTHONUNBUFFERED": "1",
}


def server_programs(directory: ServerDirectory, settings: ServerSettings) -> list[list[Program]]:
    """Return a server's programs, group after group as they must start.

    Raises:
        DeploymentError: Flower's commands are not installed.
    """
    environment = {
        **_environment(directory.flower_home),
        SERVER_DIRECTORY: str(directory.root.resolve()),
    }
    folder = directory.root.resolve()
    superlink = Program(
        SUPERLINK,
        (
            _flower("flower-superlink"),
            "--ssl-ca-certfile",
            str(directory.ca_certificate.resolve()),
            "--ssl-certfile",
            str(directory.superlink_certificate.resolve()),
            "--ssl-keyfile",
            str(directory.superlink_key.resolve()),
            "--enable-supernode-auth",
            "--superexec-auth-secret-file",
            str(directory.superexec_secret.resolve()),
            "--database",
            str(directory.superlink_database.resolve()),
            "--isolation",
            "process",
            "--host",
            "127.0.0.1",
            "--port",
            str(settings.superlink_port),
            "--disable-runtime-dependency-installation",
        ),
        folder,
        environment,
        ready=listening("127.0.0.1", settings.superlink_port),
    )
    superexec = Program(
        SUPEREXEC,
        (
            _flower("flower-superexec"),
            "--runtime-api-address",
            f"127.0.0.1:{settings.superlink_port}",
            "--root-certificates",
            str(directory.ca_certificate.resolve()),
            "--superexec-auth-secret-file",
            str(directory.superexec_secret.resolve()),
        ),
        folder,
        environment,
    )
    dialled = "127.0.0.1" if settings.bind in ("0.0.0.0", "::") else settings.bind
    proxy = Program(
        PROXY,
        (sys.executable, "-m", "alignfed.deploy.proxy", str(folder)),
        folder,
        environment,
        ready=listening(dialled, settings.port),
    )
    return [[superlink, proxy], [superexec]]


def device_programs(
    directory: DeviceDirectory, settings: DeviceSettings, prefix: str = ""
) -> list[Program]:
    """Return a device's programs.

    Args:
        directory: where it lives.
        settings: how it is set up.
        prefix: put before the programs' names, where one supervisor has several devices.

    Raises:
        DeploymentError: Flower's commands are not installed.
    """
    folder = directory.root.resolve()
    environment = _device_environment(directory)
    threads = {} if settings.threads is None else {"OMP_NUM_THREADS": str(settings.threads)}
    trainer = Program(
        prefix + TRAINER,
        (sys.executable, "-m", "alignfed.deploy.trainer_process", str(folder)),
        folder,
        {**environment, **threads, "OMP_WAIT_POLICY": "passive"},
    )
    client = Program(
        prefix + CLIENT,
        (sys.executable, "-m", "alignfed.deploy.client_process", str(folder)),
        folder,
        environment,
    )
    return [trainer, client, supernode_program(directory, settings, prefix)]


def supernode_program(
    directory: DeviceDirectory, settings: DeviceSettings, prefix: str = "", *, warm: bool = True
) -> Program:
    """Return a device's SuperNode.

    Args:
        directory: where the device lives; the secret is made there if missing.
        settings: how it is set up.
        prefix: put before the program's name.
        warm: whether the device's client process answers its messages; else Flower starts the
            ClientApp that came with each.

    Raises:
        DeploymentError: Flower's commands are not installed, or the secret cannot be written.
    """
    folder = directory.root.resolve()
    isolation: tuple[str, ...] = ()
    if warm:
        if not directory.runtime_secret.exists():
            write_secret(directory.runtime_secret, make_secret())
        secret = str(directory.runtime_secret.resolve())
        isolation = ("--isolation", "process", "--superexec-auth-secret-file", secret)
    return Program(
        prefix + SUPERNODE,
        (
            _flower("flower-supernode"),
            "--superlink",
            settings.server,
            "--root-certificates",
            str(directory.ca_certificate.resolve()),
            "--auth-supernode-private-key",
            str(directory.key.resolve()),
            "--host",
            "127.0.0.1",
            "--port",
            str(settings.runtime_port),
            *isolation,
            "--node-config",
            f'partition-id={settings.client} alignfed-directory="{folder}"',
        ),
        folder,
        _device_environment(directory),
        gives_up_with=GAVE_UP,
        pulse=connected_to(int(settings.server.rpartition(":")[2])),
    )


def connected_to(port: int) -> Callable[[int], bool]:
    """Return a question about a process: has it a connection to this port of another?

    A SuperNode asks for work every 3 s, or says every 20 s or so that it lives, and keeps the
    connection for 5 s.
    """

    def asked(pid: int) -> bool:
        with contextlib.suppress(psutil.Error):
            for connection in psutil.Process(pid).net_connections("tcp"):
                if connection.raddr and connection.raddr.port == port:
                    return True
        return False

    return asked


def listening(host: str, port: int) -> Callable[[], bool]:
    """Return a question: does somebody listen there?"""

    def asked() -> bool:
        try:
            with socket.create_connection((host, port), timeout=1):
                return True
        except OSError:
            return False

    return asked


def _device_environment(directory: DeviceDirectory) -> Mapping[str, str]:
    return {
        **_environment(directory.flower_home),
        DEVICE_DIRECTORY: str(directory.root.resolve()),
    }


def _environment(home: Path) -> Mapping[str, str]:
    # Flower's processes start others by name, so they must find those of this installation.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return {**_FLOWER, "FLWR_HOME": str(home.resolve()), "PATH": path}


def _flower(command: str) -> str:
    beside = Path(sys.executable).parent / command
    found = str(beside) if beside.exists() else shutil.which(command)
    if found is None:
        raise DeploymentError(
            f"the command {command} is not installed; pip install 'alignfed[deploy]'",
            command=command,
        )
    return found

"""Where a deployment keeps what. Nothing here opens a file: folders are made, a socket is removed.

A server's directory is made by ``alignfed deploy init``; a device's is made inside it by ``alignfed
deploy add-device`` and carried to the device. What is secret has mode 0600, and its folder 0700.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from alignfed.errors import DeploymentError

SERVER_DIRECTORY = "ALIGNFED_SERVER_DIRECTORY"
"""Environment variable that tells the ServerApp, which Flower starts, where its directory is."""

DEVICE_DIRECTORY = "ALIGNFED_DEVICE_DIRECTORY"
"""Environment variable that tells the ClientApp, which Flower starts, where its directory is."""

SOCKET_PATH_BYTES = 100
"""Longest path a Unix socket gets; Linux takes 107 bytes, BSD and macOS 103."""


@dataclass(frozen=True)
class ServerDirectory:
    """A server's directory.

    Attributes:
        root: the directory itself.
    """

    root: Path

    @property
    def settings(self) -> Path:
        """Settings of the server (TOML, ``ServerSettings``)."""
        return self.root / "deploy.toml"

    @property
    def recipe(self) -> Path:
        """The recipe of the federation (TOML)."""
        return self.root / "recipe.toml"

    @property
    def registry(self) -> Path:
        """The devices that may take part (JSON)."""
        return self.root / "registry.json"

    @property
    def ca_certificate(self) -> Path:
        """The certificate every party trusts; not secret."""
        return self.root / "ca" / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """The key that signs certificates; may be kept elsewhere between renewals."""
        return self.root / "ca" / "ca.key"

    @property
    def proxy_certificate(self) -> Path:
        """The certificate that devices meet: names of the host as they dial it."""
        return self.root / "server" / "proxy.crt"

    @property
    def proxy_key(self) -> Path:
        """Its key."""
        return self.root / "server" / "proxy.key"

    @property
    def superlink_certificate(self) -> Path:
        """The certificate of the SuperLink: loopback names only."""
        return self.root / "server" / "superlink.crt"

    @property
    def superlink_key(self) -> Path:
        """Its key."""
        return self.root / "server" / "superlink.key"

    @property
    def superexec_secret(self) -> Path:
        """What SuperLink and SuperExec know each other by."""
        return self.root / "server" / "superexec.secret"

    @property
    def devices(self) -> Path:
        """Folder of the directories that are carried to devices."""
        return self.root / "devices"

    def device(self, name: str) -> DeviceDirectory:
        """The directory to carry to one device."""
        return DeviceDirectory(self.devices / name)

    @property
    def state(self) -> Path:
        """Folder of what processes keep between restarts."""
        return self.root / "state"

    @property
    def superlink_database(self) -> Path:
        """Flower's own state (SQLite)."""
        return self.state / "superlink.sqlite"

    @property
    def status(self) -> Path:
        """What the server says about itself, replaced every few seconds (JSON)."""
        return self.state / "status.json"

    @property
    def processes(self) -> Path:
        """What the supervisor says about its processes (JSON)."""
        return self.state / "processes.json"

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME of the server's Flower commands: connection file, unpacked apps."""
        return self.state / "flower"

    @property
    def app(self) -> Path:
        """The thin Flower app that ``flwr run`` submits."""
        return self.state / "app"

    @property
    def lock(self) -> Path:
        """The file that carries the running server's lock."""
        return self.state / "server.lock"

    @property
    def logs(self) -> Path:
        """Folder of the processes' logs."""
        return self.root / "logs"

    @property
    def systemd(self) -> Path:
        """Folder of the systemd units to install."""
        return self.root / "systemd"

    def prepare(self) -> None:
        """Make the folders that are missing.

        Raises:
            DeploymentError: one cannot be made.
        """
        _make(self.root, 0o755)
        for folder in (self.devices, self.state, self.superlink_key.parent, self.ca_key.parent):
            _make(folder, 0o700)
        for folder in (self.logs, self.flower_home):
            _make(folder, 0o700)


@dataclass(frozen=True)
class DeviceDirectory:
    """A device's directory.

    Attributes:
        root: the directory itself.
    """

    root: Path

    @property
    def settings(self) -> Path:
        """Settings of the device (TOML, ``DeviceSettings``)."""
        return self.root / "device.toml"

    @property
    def recipe(self) -> Path:
        """The recipe of the federation (TOML), as the server has it."""
        return self.root / "recipe.toml"

    @property
    def ca_certificate(self) -> Path:
        """The certificate by which the device knows the server."""
        return self.root / "ca.crt"

    @property
    def key(self) -> Path:
        """The device's private key (OpenSSH format, as Flower reads it)."""
        return self.root / "node.key"

    @property
    def public_key(self) -> Path:
        """Its public half (one OpenSSH line); not secret."""
        return self.root / "node.pub"

    @property
    def outbox(self) -> Path:
        """Folder of finished uploads that the server has not acknowledged."""
        return self.root / "outbox"

    @property
    def state(self) -> Path:
        """Folder of what the device keeps between restarts: error feedback, counts."""
        return self.root / "state"

    @property
    def status(self) -> Path:
        """What the trainer says about itself: model loads, tasks, last error (JSON)."""
        return self.state / "status.json"

    @property
    def processes(self) -> Path:
        """What the supervisor says about its processes (JSON)."""
        return self.state / "processes.json"

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME of the device's Flower commands."""
        return self.state / "flower"

    @property
    def runtime_secret(self) -> Path:
        """What SuperNode and client process know each other by."""
        return self.state / "runtime.secret"

    @property
    def lock(self) -> Path:
        """The file that carries the running device's lock."""
        return self.state / "device.lock"

    @property
    def logs(self) -> Path:
        """Folder of the processes' logs."""
        return self.root / "logs"

    @property
    def systemd(self) -> Path:
        """Folder of the systemd unit to install."""
        return self.root / "systemd"

    @property
    def trainer_socket(self) -> Path:
        """The trainer's Unix socket.

        It is in ``state`` or, where that path is too long, in a folder of the system's temporary
        one that belongs to this user alone.
        """
        path = self.state.resolve() / "trainer.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES:
            return path
        digest = hashlib.sha256(os.fsencode(self.state.resolve())).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"alignfed-{os.getuid()}-{digest}" / "trainer.sock"

    def prepare(self) -> None:
        """Make the folders that are missing.

        Raises:
            DeploymentError: one cannot be made, or the socket's folder is somebody else's.
        """
        _make(self.root, 0o755)
        for folder in (self.outbox, self.state, self.flower_home, self.logs):
            _make(folder, 0o700)
        folder = self.trainer_socket.parent
        _make(folder, 0o700)
        found = folder.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise DeploymentError(
                f"{folder} belongs to user {found.st_uid} with mode {found.st_mode & 0o777:o}; the"
                f" trainer's socket needs a folder of user {os.getuid()} with mode 700: remove it,"
                " or move the device's directory to a shorter path",
                path=str(folder),
            )

    def forget_socket(self) -> None:
        """Remove the trainer's socket, and its folder where that is a temporary one.

        For when no trainer works here any more; what cannot be removed stays.
        """
        path = self.trainer_socket
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            if path.parent != self.state.resolve():
                path.parent.rmdir()


def _make(folder: Path, mode: int) -> None:
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise DeploymentError(
            f"{folder} cannot be made: {error.strerror}; choose another directory or make its"
            " parent writable",
            path=str(folder),
        ) from error

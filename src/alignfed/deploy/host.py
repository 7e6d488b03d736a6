"""A device at work: its trainer and its SuperNode, kept running."""

from __future__ import annotations

import threading
from pathlib import Path

from alignfed.deploy.directory import DeviceDirectory
from alignfed.deploy.loglines import LogKeeper
from alignfed.deploy.processes import device_programs
from alignfed.deploy.settings import DeviceSettings
from alignfed.deploy.supervisor import Supervisor
from alignfed.errors import DeploymentError
from alignfed.journal.lock import DirectoryLock


class DeviceHost:
    """Runs a device. Used from one thread."""

    def __init__(
        self, directory: DeviceDirectory, settings: DeviceSettings, *, adopts: bool = False
    ) -> None:
        """Take the directory's lock.

        Args:
            directory: the device's.
            settings: its settings.
            adopts: as ``Supervisor`` has it.

        Raises:
            DeploymentError: a file that belongs there is missing.
            JournalError: another process runs this device.
        """
        check_complete(directory)
        directory.prepare()
        self._directory = directory
        self._programs = device_programs(directory, settings)
        self._lock = DirectoryLock(directory.lock)
        logs = LogKeeper(directory.logs, settings.log.bytes, settings.log.files)
        self.supervisor = Supervisor(logs, directory.processes, adopts=adopts)

    def start(self) -> None:
        """Start trainer, client process and SuperNode; each finds the others when they are there.

        Raises:
            DeploymentError: a program cannot be started.
        """
        self.supervisor.start(self._programs)

    def run(self, stop: threading.Event) -> None:
        """Go on until ``stop`` is set."""
        self.supervisor.run(stop)

    def stop(self) -> None:
        """End all, the SuperNode first, so that no task comes to a trainer that is gone."""
        self.supervisor.stop([[program.name] for program in reversed(self._programs)])
        self._directory.forget_socket()
        self._lock.release()


def check_complete(directory: DeviceDirectory) -> None:
    """Refuse a device's directory that lacks what only the operator can bring.

    Raises:
        DeploymentError: a file is missing, or the key is open to others.
    """
    for path, remedy in (
        (directory.ca_certificate, "copy it from the directory add-device made on the server"),
        (directory.recipe, "copy it from the directory add-device made on the server"),
        (directory.key, "it is the private half of the key that add-device was given"),
    ):
        if not path.exists():
            raise DeploymentError(f"{path} does not exist; {remedy}", path=str(path))
    _check_closed(directory.key)


def _check_closed(key: Path) -> None:
    mode = key.stat().st_mode & 0o777
    if mode & 0o077:
        raise DeploymentError(
            f"{key} has mode {mode:o}, so others may read it; run: chmod 600 {key}", path=str(key)
        )

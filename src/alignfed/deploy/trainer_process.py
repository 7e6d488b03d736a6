"""The trainer of a device: a process that loads the base model once and stays.

Started as ``python -m alignfed.deploy.trainer_process DIRECTORY`` by the device's supervisor, which
starts it again when it dies. It takes one task at a time from its Unix socket; an upload is on disk
before the socket says so. After an error that nobody foresaw it answers, and ends: the next process
begins with a sound model.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from alignfed.config import load_recipe
from alignfed.deploy.device import Device, build_device
from alignfed.deploy.directory import DeviceDirectory
from alignfed.deploy.settings import load_device_settings
from alignfed.deploy.trainer_status import read_status
from alignfed.errors import AlignFedError
from alignfed.flower.outbox import Outbox
from alignfed.flower.training_socket import (
    MOST_BYTES,
    TrainerError,
    listen,
    read_task,
    receive_frame,
    send_frame,
)
from alignfed.journal.atomic import write_text_atomically
from alignfed.journal.lock import DirectoryLock

_log = logging.getLogger("alignfed.trainer")

_SILENCE_S = 60.0
"""A client that has connected and says nothing for so long is dropped."""


class Trainer:
    """Serves one device's socket."""

    def __init__(self, directory: DeviceDirectory) -> None:
        """Load what the device's directory names.

        Raises:
            AlignFedError: something it names does not exist or does not fit, or another trainer
                works there.
        """
        directory.prepare()
        self._directory = directory
        self._lock = DirectoryLock(directory.state / "trainer.lock")
        settings = load_device_settings(directory.settings)
        self._outbox = Outbox(directory.outbox / "outbox.sqlite", settings.outbox_bytes)
        before = read_status(directory.status)
        self._status = replace(before, pid=os.getpid(), state="loading")
        self._note(model_loads=before.model_loads + 1)
        began_s = time.monotonic()
        self._device: Device = build_device(
            load_recipe(directory.recipe, files_exist=False),
            settings.client,
            settings.data,
            settings.compute,
        )
        self._note(step_s=self._device.step_s)
        _log.info(
            "client %d: base model loaded in %.1f s (load %d of this device)",
            settings.client,
            time.monotonic() - began_s,
            self._status.model_loads,
        )

    def serve(self) -> None:
        """Take tasks until killed, or until an error that nobody foresaw.

        Raises:
            AlignFedError: the socket cannot be made.
        """
        with listen(self._directory.trainer_socket) as listener:
            self._note(state="ready")
            sound = True
            while sound:
                connection, _ = listener.accept()
                with connection:
                    sound = self._answer(connection)

    def _answer(self, connection: socket.socket) -> bool:
        """Train what a connection asks for; return whether this process may go on."""
        sound, words = True, {"kind": "trained"}
        try:
            connection.settimeout(_SILENCE_S)
            order = read_task(*receive_frame(connection, MOST_BYTES))
        except (OSError, TrainerError) as error:
            _log.warning("dropped a connection: %s", error)
            return True
        _log.info("task %d begins, from version %d", order.task_id, order.base_version)
        self._note(state="training")
        try:
            loads = {"model_loads": float(self._status.model_loads)}
            if self._device.work(order, self._outbox, loads):
                self._note(tasks=self._status.tasks + 1)
                _log.info("task %d is finished and kept", order.task_id)
            else:
                _log.info("task %d was finished before", order.task_id)
        except (AlignFedError, MemoryError, torch.OutOfMemoryError) as error:
            words = self._failed(error)
            _log.error("task %d failed: %s", order.task_id, error)
        except Exception as error:
            words, sound = self._failed(error), False
            _log.exception("task %d failed, and this process ends", order.task_id)
        self._note(state="ready")
        try:
            send_frame(connection, words)
        except OSError as error:
            _log.warning("nobody waits for task %d any more: %s", order.task_id, error)
        return sound

    def _failed(self, error: BaseException) -> dict[str, str]:
        reason = str(error) or type(error).__name__
        self._note(last_error=reason)
        return {"kind": "failed", "reason": reason}

    def _note(self, **changes: float | str | None) -> None:
        self._status = replace(self._status, **changes)  # type: ignore[arg-type]
        write_text_atomically(
            self._directory.status, json.dumps(asdict(self._status), indent=2) + "\n"
        )


def main(arguments: list[str]) -> int:
    """Run the trainer of the directory named; return an exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if len(arguments) != 1:
        print("usage: python -m alignfed.deploy.trainer_process DIRECTORY", file=sys.stderr)
        return 2
    try:
        Trainer(DeviceDirectory(Path(arguments[0]))).serve()
    except AlignFedError as error:
        _log.error("%s", error)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

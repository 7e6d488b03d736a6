"""How a thin client process hands tasks to the trainer on the same device: a Unix socket.

One connection a task. A frame is two lengths (4 and 8 bytes, big-endian), a JSON object and raw
bytes; nothing is ever unpickled, and both lengths are bounded before anything is read. The socket
belongs to its user alone (mode 0600). A connection that closes without an answer is a trainer that
died: the task is handed over again when it is back, since tasks are idempotent by their ids.

No torch here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignfed.errors import DeploymentError
from alignfed.flower.messages import TaskOrder

_LENGTHS = struct.Struct(">IQ")
_MOST_WORDS = 64 << 10
MOST_BYTES = 4 << 30
"""Largest adapter a frame may carry."""

_MOST_DEATHS = 3
_PAUSE_S = 0.1


class TrainerError(DeploymentError):
    """The trainer cannot be reached, or does not speak as it must."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The task's upload is in the outbox."""


@dataclass(frozen=True, slots=True)
class NotTrained:
    """The task will not be finished."""

    reason: str


class TrainerClient:
    """Hands tasks to the trainer behind a socket."""

    def __init__(self, path: Path, patience_s: float = 600.0) -> None:
        """Use the socket at ``path``.

        Args:
            path: where the trainer listens, now or later.
            patience_s: longest wait for a trainer that is not there (a large model takes minutes
                to load); how long training takes is the server's deadline to bound.
        """
        self._path, self._patience_s = path, patience_s

    def train(self, order: TaskOrder) -> Trained | NotTrained:
        """Have a task trained; wait for a trainer that starts, restarts or is busy."""
        began_s, deaths = time.monotonic(), 0
        limit_s = math.inf if order.deadline_s is None else began_s + order.deadline_s
        while True:
            try:
                with self._connected(limit_s) as connection:
                    send_frame(connection, _words(order), order.payload)
                    words, _ = receive_frame(connection, 0)
            except TrainerError as error:
                return NotTrained(str(error))
            except OSError:
                deaths += 1
                if deaths >= _MOST_DEATHS:
                    return NotTrained(
                        f"the trainer died {deaths} times while it had task {order.task_id}; its"
                        " log says why"
                    )
                continue
            if words == {"kind": "trained"}:
                return Trained()
            return NotTrained(str(words.get("reason", "the trainer gives no reason")))

    @contextlib.contextmanager
    def _connected(self, limit_s: float) -> Iterator[socket.socket]:
        until_s = min(limit_s, time.monotonic() + self._patience_s)
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(os.fspath(self._path))
            except OSError as error:
                connection.close()
                if time.monotonic() >= until_s:
                    raise TrainerError(
                        f"no trainer at {self._path} ({error.strerror}); is it running?",
                        path=str(self._path),
                    ) from error
                time.sleep(_PAUSE_S)
                continue
            with connection:
                yield connection
            return


def listen(path: Path) -> socket.socket:
    """Return a socket that listens at ``path``, for its owner alone; an old one is replaced.

    Raises:
        TrainerError: it cannot be made there.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen()
    except OSError as error:
        listener.close()
        raise TrainerError(
            f"the trainer cannot listen at {path}: {error}", path=str(path)
        ) from error
    return listener


def read_task(words: dict[str, Any], payload: bytes) -> TaskOrder:
    """Return the task that a frame carries.

    Raises:
        TrainerError: it is none; client and trainer are of different versions.
    """
    try:
        return TaskOrder(**words, payload=payload)
    except TypeError as error:
        raise TrainerError(f"not a task: {error}; restart client and trainer together") from error


def send_frame(connection: socket.socket, words: dict[str, Any], data: bytes = b"") -> None:
    """Send one frame.

    Raises:
        OSError: the other side is gone.
    """
    text = json.dumps(words).encode()
    connection.sendall(_LENGTHS.pack(len(text), len(data)) + text)
    if data:
        connection.sendall(data)


def receive_frame(connection: socket.socket, most_bytes: int) -> tuple[dict[str, Any], bytes]:
    """Return a frame's words and bytes.

    Raises:
        OSError: the other side is gone before the frame was whole.
        TrainerError: a length beyond its limit, or words that are no JSON object.
    """
    num_words, num_bytes = _LENGTHS.unpack(_receive(connection, _LENGTHS.size))
    if num_words > _MOST_WORDS or num_bytes > most_bytes:
        raise TrainerError(
            f"a frame of {num_words} and {num_bytes} bytes, at most {_MOST_WORDS} and {most_bytes}"
            " are expected"
        )
    try:
        words = json.loads(_receive(connection, num_words))
    except (ValueError, RecursionError) as error:
        raise TrainerError(f"a frame's words are not JSON: {error}") from error
    if not isinstance(words, dict):
        raise TrainerError("a frame's words are not a JSON object")
    return words, _receive(connection, num_bytes)


def _words(order: TaskOrder) -> dict[str, Any]:
    return {
        "run": order.run,
        "training_digest": order.training_digest,
        "task_id": order.task_id,
        "base_version": order.base_version,
        "dispatch": order.dispatch,
        "encoding": order.encoding,
        "steps": order.steps,
    }


def _receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = connection.recv_into(view[done:])
        if got == 0:
            raise ConnectionError("the other side closed the connection")
        done += got
    return bytes(data)

"""One process that answers every message a SuperNode gets, instead of a fresh one for each.

Flower starts a process a message, which costs seconds of imports, and runs in it the app that came
with the message. Here the SuperNode (``--isolation process``) is asked for its next task by a
process that stays, and the app is the one installed on the device: what travels from the server is
data alone, never code that runs.

A message under work is noted on disk, so that a process that was killed over it is followed by one
that answers it. It is noted once: a message that kills its process twice is given up.

It speaks to the SuperNode's Runtime API as ``flwr-clientapp`` of Flower 1.41 does. That is not a
public interface; ``pyproject.toml`` holds Flower to this minor version, and the tests run it.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

import httpx
from flwr.app import Context, Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output
from google.protobuf.message import DecodeError

_log = logging.getLogger(__name__)

Answer: TypeAlias = Callable[[Message, Context], Message]

POLL_S = 0.2
"""Pause between questions for a task: five small requests a second over loopback."""

_AWAY_S = 1.0
_HEARTBEAT_S = 10.0
_LENGTHS = struct.Struct(">IQQ")
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


class WarmClient:
    """Answers a SuperNode's messages, one at a time."""

    def __init__(
        self,
        address: str,
        answer: Answer,
        secret: bytes | None = None,
        note: Path | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        """Serve the SuperNode whose Runtime API is at ``address`` (loopback, plain HTTP).

        Args:
            address: host and port.
            answer: a ClientApp, or any function from message and context to reply.
            secret: what the SuperNode asks of executors (``--superexec-auth-secret-file``).
            note: where to note the message under work; None notes nothing.
            poll_s: pause between questions.
        """
        self._address, self._answer, self._poll_s = address, answer, poll_s
        self._secret, self._note = secret, note

    def serve(self) -> None:
        """Answer messages until the process ends; a SuperNode that is away is waited for."""
        extra: list[ProtobufClientInterceptor] = []
        if self._secret is not None:
            extra.append(
                SuperExecAuthHttpInterceptor(
                    master_secret=self._secret, protected_methods=frozenset({_ACQUIRE})
                )
            )
        client, away = self._client(*extra), False
        self._resume()
        while True:
            try:
                found = client.AcquireTask(
                    AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
                )
                if away:
                    _log.info("the SuperNode at %s is back", self._address)
                    away = False
                if found.HasField("task") and found.token:
                    self._carry_out(found.token)
                    continue
                pause_s = self._poll_s
            except httpx.HTTPError as error:
                if not away:
                    _log.warning(
                        "no sound answer from the SuperNode at %s: %s", self._address, error
                    )
                    away = True
                pause_s = _AWAY_S
            time.sleep(pause_s)

    def _carry_out(self, token: str) -> None:
        """Pull one message, answer it, push the reply."""
        client = self._client(RuntimeTokenHttpInterceptor(token))
        try:
            with _Heartbeat(client):
                message, context, _, _ = pull_task_input(client)
                if self._note is not None:
                    write_note(self._note, token, message, context)
                self._finish(client, message, context)
        finally:
            client.close()
            if self._note is not None:
                self._note.unlink(missing_ok=True)

    def _resume(self) -> None:
        """Answer the message that the process before this one was killed over, if any."""
        found = None if self._note is None else take_note(self._note)
        if found is None:
            return
        token, message, context = found
        TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, context.node_id
        client = self._client(RuntimeTokenHttpInterceptor(token))
        try:
            # Refused where the SuperNode has given the message up, or is a new one.
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            _log.info("going on with the message that the last process was killed over")
            with _Heartbeat(client):
                self._finish(client, message, context)
        except httpx.HTTPError as error:
            _log.warning("the last process's message cannot be answered any more: %s", error)
        finally:
            client.close()

    def _finish(self, client: RuntimeHttpClient, message: Message, context: Context) -> None:
        reply, problem = self._reply(message, context)
        push_message(client, reply, context)
        status = SubStatus.FAILED if problem else SubStatus.COMPLETED
        push_task_output(client, context, status, problem)

    def _reply(self, message: Message, context: Context) -> tuple[Message, str]:
        try:
            return self._answer(message, context), ""
        except Exception as error:
            _log.exception("a message could not be answered")
            problem = f"{type(error).__name__}: {error}"
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            return Message(Error(code=code, reason=problem), reply_to=message), problem

    def _client(self, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
        return RuntimeHttpClient.from_server_address(
            server_address=self._address,
            insecure=True,
            root_certificates=None,
            interceptors=[version, *interceptors],
        )


def write_note(path: Path, token: str, message: Message, context: Context) -> None:
    """Note a message under work, for a process of the same minute: nothing is synced."""
    parts = (
        token.encode(),
        message_to_proto(message).SerializeToString(),
        context_to_proto(context).SerializeToString(),
    )
    temporary = path.with_name(path.name + ".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(_LENGTHS.pack(*map(len, parts)))
        for part in parts:
            file.write(part)
    temporary.replace(path)


def take_note(path: Path) -> tuple[str, Message, Context] | None:
    """Return what was noted and forget it; None where nothing sound was."""
    try:
        data = path.read_bytes()
        path.unlink()
        sizes = _LENGTHS.unpack_from(data)
        if len(data) != _LENGTHS.size + sum(sizes):
            raise ValueError(f"{len(data)} bytes")
        token, message, context = (
            data[start : start + size]
            for size, start in zip(sizes, accumulate(sizes, initial=_LENGTHS.size), strict=False)
        )
        return (
            token.decode(),
            message_from_proto(ProtoMessage.FromString(message)),
            context_from_proto(ProtoContext.FromString(context)),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, struct.error, DecodeError) as error:
        _log.warning("the note %s is not sound: %s", path, error)
        return None


class _Heartbeat:
    """Tells the SuperNode that a task is being worked on, which may take hours."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client, self._done = client, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(_HEARTBEAT_S):
            try:
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            except httpx.HTTPError as error:
                _log.warning("the SuperNode did not take a heartbeat: %s", error)

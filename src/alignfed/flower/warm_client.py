"""One process that answers every message a SuperNode gets, instead of a fresh one for each.

Flower starts a process a message, which costs seconds of imports, and runs in it the app that came
with the message. Here the SuperNode (``--isolation process``) is asked for its next task by a
process that stays, and the app is the one installed on the device: what travels from the server is
data alone, never code that runs.

It speaks to the SuperNode's Runtime API as ``flwr-clientapp`` of Flower 1.41 does. That is not a
public interface; ``pyproject.toml`` holds Flower to this minor version, and the tests run it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

import httpx
from flwr.app import Context, Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

_log = logging.getLogger(__name__)

Answer: TypeAlias = Callable[[Message, Context], Message]

POLL_S = 0.2
"""Pause between questions for a task: five small requests a second over loopback."""

_AWAY_S = 1.0
_HEARTBEAT_S = 10.0
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


class WarmClient:
    """Answers a SuperNode's messages, one at a time."""

    def __init__(
        self, address: str, answer: Answer, secret: bytes | None = None, poll_s: float = POLL_S
    ) -> None:
        """Serve the SuperNode whose Runtime API is at ``address`` (loopback, plain HTTP).

        Args:
            address: host and port.
            answer: a ClientApp, or any function from message and context to reply.
            secret: what the SuperNode asks of executors (``--superexec-auth-secret-file``).
            poll_s: pause between questions.
        """
        self._address, self._answer, self._poll_s = address, answer, poll_s
        self._secret = secret

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
                reply, problem = self._reply(message, context)
                push_message(client, reply, context)
            status = SubStatus.FAILED if problem else SubStatus.COMPLETED
            push_task_output(client, context, status, problem)
        finally:
            client.close()

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

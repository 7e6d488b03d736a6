"""AlignFed's own words: sealed payloads, acknowledged uploads, collections after an outage."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flwr.app import RecordDict

from alignfed.core.adapter import Adapter
from alignfed.core.lora.exchange import Exchange
from alignfed.core.reasons import RejectReason
from alignfed.core.update import Task
from alignfed.flower import messages, wire
from alignfed.flower.blob import WireError
from alignfed.flower.messages import (
    CollectOrder,
    Encoding,
    Failure,
    ProtocolError,
    StopOrder,
    TaskOrder,
)
from alignfed.flower.ports import Answer, Decoded, RefusedError

_PAYLOADS_KEPT = 4
"""Encoded adapters kept for the next order: few versions are sent at a time, in few ranks."""


class AlignFedDialect:
    """Implements ``Dialect`` for devices that run ``client_app.py``."""

    message_type = messages.MESSAGE_TYPE
    keeps_uploads = True

    def __init__(
        self, run: str, training_digest: str, encoding: Encoding, exchange: Exchange
    ) -> None:
        """Speak for one run.

        Args:
            run: its name, the same over restarts.
            training_digest: digest of what fixes a client's work.
            encoding: how uploads are to be written.
            exchange: tells clients of different ranks apart.
        """
        self._run = run
        self._digest = training_digest
        self._encoding: Encoding = encoding
        self._exchange = exchange
        self._payloads: dict[tuple[int, int | None], bytes] = {}

    def task(
        self, task: Task, sent: Adapter, left_s: float, acknowledged: Sequence[int]
    ) -> RecordDict:
        """Return an order to train."""
        return messages.write_order(
            TaskOrder(
                run=self._run,
                training_digest=self._digest,
                task_id=task.task_id,
                base_version=task.base_version,
                dispatch=task.dispatch,
                payload=self._payload(task, sent),
                encoding=self._encoding,
                steps=task.steps,
                deadline_s=None if math.isinf(left_s) else max(left_s, 0.0),
                acknowledged=tuple(acknowledged),
            )
        )

    def collect(self, acknowledged: Sequence[int]) -> RecordDict:
        """Return an order to send what is finished."""
        order = CollectOrder(self._run, self._digest, tuple(acknowledged))
        return messages.write_order(order)

    def stop(self, acknowledged: Sequence[int]) -> RecordDict:
        """Return the word that the run is over."""
        return messages.write_order(StopOrder(self._run, self._digest, tuple(acknowledged)))

    def read(self, content: RecordDict, task_id: int | None) -> Answer:
        """Return what a reply holds.

        Raises:
            RefusedError: it breaks the protocol or belongs to another run.
        """
        try:
            reply = messages.read_reply(content)
        except ProtocolError as error:
            raise RefusedError(str(error), error.reason) from error
        if reply.run != self._run:
            raise RefusedError(
                f"the answer is for run {reply.run!r:.100}, this is {self._run}",
                RejectReason.WRONG_RUN,
            )
        if isinstance(reply, Failure):
            return Answer({}, reply.task_id, reply.reason)
        return Answer(reply.payloads, step_s=reply.step_s)

    def decode(self, task_id: int, payload: bytes, base: Adapter) -> Decoded:
        """Return an upload, checked against what was sent.

        Raises:
            RefusedError: it is not the upload of this task.
        """
        try:
            claims, adapter = wire.decode_upload(payload, base)
        except WireError as error:
            raise RefusedError(str(error), error.reason) from error
        if claims.run != self._run:
            raise RefusedError(
                f"the upload is for run {claims.run!r:.100}, this is {self._run}",
                RejectReason.WRONG_RUN,
            )
        if claims.task_id != task_id:
            raise RefusedError(
                f"the upload claims task {claims.task_id}, it came as task {task_id}'s",
                RejectReason.WRONG_TASK,
            )
        return Decoded(claims.base_version, adapter, claims.num_examples, claims.metrics)

    def size_bytes(self, content: RecordDict) -> int:
        """Return the bytes of a message's payloads."""
        return messages.size_bytes(content)

    def _payload(self, task: Task, sent: Adapter) -> bytes:
        key = (task.base_version, self._exchange.ranks.get(task.client_id))
        payload = self._payloads.pop(key, None)
        if payload is None:
            download = wire.Download(self._run, task.base_version, sent)
            payload = wire.encode_download(download, wire.download_encoding(self._encoding))
        self._payloads[key] = payload
        while len(self._payloads) > _PAYLOADS_KEPT:
            del self._payloads[next(iter(self._payloads))]
        return payload


__all__ = ["AlignFedDialect"]

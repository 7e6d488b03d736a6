"""The words between server and device: typed orders and replies, to and from Flower's records.

What comes from the other side is checked here, name by name and type by type, and nothing of it is
executed. This file imports neither torch nor any part that does: every message to a device starts
a process that reads it. An adapter passes through as opaque bytes (``wire.py`` knows its inside).

Server to device: ``TaskOrder``, ``CollectOrder``, ``StopOrder``. Device to server: ``Uploads``,
``Failure``. Each order also tells which of the device's finished uploads are safe at the server;
the device may then forget them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeGuard

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from alignfed.core.reasons import RejectReason
from alignfed.errors import AlignFedError

PROTOCOL = 2
"""Version of these words. Server and device must speak the same."""

MESSAGE_TYPE = "train"
"""Flower's name for the kind of message that carries them; others go unanswered."""

RECORD = "alignfed"
ADAPTER = "adapter"
UPLOAD = "upload-"
"""Names of the records in a message; an upload's ends in its task id."""

BYTES = "alignfed.bytes"
"""How arrays are serialised: as they are. Flower never looks inside."""

Encoding: TypeAlias = Literal["fp32", "bf16", "fp16", "int8"]
ENCODINGS: tuple[Encoding, ...] = ("fp32", "bf16", "fp16", "int8")

MAX_TASK_ID = 2**53
MAX_REASON = 500
_MAX_UPLOADS = 1_000


class ProtocolError(AlignFedError):
    """A message does not say what it must say.

    Attributes:
        reason: why, as the journal counts it.
    """

    reason: RejectReason

    def __init__(self, message: str, reason: RejectReason = RejectReason.MALFORMED) -> None:
        """Keep the reason."""
        super().__init__(message, reason=reason)


@dataclass(frozen=True, slots=True)
class TaskOrder:
    """Train.

    Attributes:
        run: the server's run, the same over its restarts.
        training_digest: digest of the recipe's parts that fix a client's work; a device with
            another one must refuse.
        task_id: which task; a device that has finished it answers without training again.
        base_version: the version of the adapter that is sent.
        dispatch: how many tasks this client was given before; it fixes the batches.
        payload: the adapter, as ``wire.py`` writes it.
        encoding: how the upload is to be written.
        steps: local steps, where the server assigns them (None: the recipe's).
        deadline_s: seconds from now after which the server stops waiting (None: never).
        acknowledged: tasks whose uploads are safe at the server.
    """

    run: str
    training_digest: str
    task_id: int
    base_version: int
    dispatch: int
    payload: bytes = field(repr=False)
    encoding: Encoding = "fp32"
    steps: int | None = None
    deadline_s: float | None = None
    acknowledged: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CollectOrder:
    """Send what you have finished and the server has not acknowledged."""

    run: str
    training_digest: str
    acknowledged: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StopOrder:
    """The run is over; nothing more will be asked for."""

    run: str
    training_digest: str
    acknowledged: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Uploads:
    """Finished work.

    Attributes:
        run: the server's run it belongs to.
        payloads: by task id, as ``wire.py`` writes them; empty where there is nothing to send.
        step_s: seconds a local step takes the device, where it says so.
    """

    run: str
    payloads: Mapping[int, bytes] = field(repr=False)
    step_s: float | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A task will not be finished.

    Attributes:
        run: the server's run it belongs to.
        task_id: which one.
        reason: why, for people; cut to ``MAX_REASON`` characters.
    """

    run: str
    task_id: int
    reason: str


Order: TypeAlias = TaskOrder | CollectOrder | StopOrder
Reply: TypeAlias = Uploads | Failure

_KINDS: Mapping[str, type[CollectOrder] | type[StopOrder]] = {
    "collect": CollectOrder,
    "stop": StopOrder,
}


def write_order(order: Order) -> RecordDict:
    """Return the content of a message to a device."""
    words: dict[str, Any] = {
        "protocol": PROTOCOL,
        "run": order.run,
        "training_digest": order.training_digest,
        "acknowledged": list(order.acknowledged),
    }
    if not isinstance(order, TaskOrder):
        words["kind"] = "collect" if isinstance(order, CollectOrder) else "stop"
        return RecordDict({RECORD: ConfigRecord(words)})
    words |= {
        "kind": "task",
        "task_id": order.task_id,
        "base_version": order.base_version,
        "dispatch": order.dispatch,
        "steps": -1 if order.steps is None else order.steps,
        "encoding": order.encoding,
        "deadline_s": -1.0 if order.deadline_s is None else float(order.deadline_s),
    }
    return RecordDict({RECORD: ConfigRecord(words), ADAPTER: _wrap(order.payload)})


def read_order(content: RecordDict) -> Order:
    """Return what a server asks for.

    Raises:
        ProtocolError: it speaks another protocol, or a word is missing or of the wrong type.
    """
    words = _words(content)
    kind = _text(words, "kind")
    run, digest = _text(words, "run"), _text(words, "training_digest")
    acknowledged = _task_ids(words, "acknowledged")
    if kind in _KINDS:
        return _KINDS[kind](run, digest, acknowledged)
    if kind != "task":
        raise ProtocolError(f"the server asks for {kind!r}, which is none of task, collect, stop")
    encoding = _text(words, "encoding")
    if not _is_encoding(encoding):
        raise ProtocolError(f"encoding is {encoding!r}, must be one of {', '.join(ENCODINGS)}")
    steps, deadline_s = _whole(words, "steps", -1), _number(words, "deadline_s")
    return TaskOrder(
        run=run,
        training_digest=digest,
        task_id=_whole(words, "task_id", 0),
        base_version=_whole(words, "base_version", 0),
        dispatch=_whole(words, "dispatch", 0),
        payload=_unwrap(content, ADAPTER),
        encoding=encoding,
        steps=None if steps < 0 else steps,
        deadline_s=None if deadline_s < 0 else deadline_s,
        acknowledged=acknowledged,
    )


def write_reply(reply: Reply) -> RecordDict:
    """Return the content of a message to the server."""
    words: dict[str, Any] = {"protocol": PROTOCOL, "run": reply.run}
    if isinstance(reply, Failure):
        words |= {
            "kind": "failed",
            "task_id": reply.task_id,
            "reason": reply.reason[:MAX_REASON],
        }
        return RecordDict({RECORD: ConfigRecord(words)})
    words |= {
        "kind": "uploads",
        "trained": list(reply.payloads),
        "step_s": -1.0 if reply.step_s is None else reply.step_s,
    }
    records = {UPLOAD + str(task_id): _wrap(data) for task_id, data in reply.payloads.items()}
    return RecordDict({RECORD: ConfigRecord(words), **records})


def read_reply(content: RecordDict) -> Reply:
    """Return what a device answers. The payloads are not looked into.

    Raises:
        ProtocolError: it speaks another protocol, or a word or record is missing, left over, or
            of the wrong type.
    """
    words = _words(content)
    kind, run = _text(words, "kind"), _text(words, "run")
    if kind == "failed":
        return Failure(run, _whole(words, "task_id", 0), _text(words, "reason")[:MAX_REASON])
    if kind != "uploads":
        raise ProtocolError(f"the device answers {kind!r:.100}, which is none of uploads, failed")
    trained = _task_ids(words, "trained")
    if len(trained) > _MAX_UPLOADS or len(set(trained)) < len(trained):
        raise ProtocolError(
            f"a reply lists {len(trained)} uploads, must be at most {_MAX_UPLOADS} and different"
        )
    expected = {RECORD, *(UPLOAD + str(task_id) for task_id in trained)}
    if (found := set(content)) != expected:
        name = min(found ^ expected, key=str)
        raise ProtocolError(
            f"record {name!r:.100} is {'missing' if name in expected else 'not asked for'}"
        )
    step_s = _number(words, "step_s")
    payloads = {one: _unwrap(content, UPLOAD + str(one)) for one in trained}
    return Uploads(run, payloads, step_s if step_s > 0 else None)


def size_bytes(content: RecordDict) -> int:
    """Return the bytes of all arrays in a message, which is nearly all that travels."""
    return sum(
        len(array.data) for record in content.array_records.values() for array in record.values()
    )


def _wrap(data: bytes) -> ArrayRecord:
    return ArrayRecord({"payload": Array("uint8", (len(data),), BYTES, data)})


def _unwrap(content: RecordDict, name: str) -> bytes:
    record = content.array_records.get(name)
    if record is None or list(record) != ["payload"]:
        raise ProtocolError(f"record {name!r:.100} must hold one array called payload")
    array = record["payload"]
    if array.dtype != "uint8" or array.stype != BYTES or tuple(array.shape) != (len(array.data),):
        raise ProtocolError(
            f"the array in {name!r:.100} is {array.dtype!r:.50} {array.stype!r:.50}, must be uint8"
            f" {BYTES} of its own length"
        )
    return array.data


def _words(content: RecordDict) -> ConfigRecord:
    words = content.config_records.get(RECORD)
    if words is None:
        raise ProtocolError(f"the message has no record {RECORD!r}")
    if (found := words.get("protocol")) != PROTOCOL:
        raise ProtocolError(
            f"the message speaks protocol {found!r:.50}, this version of AlignFed {PROTOCOL};"
            " install the same version on server and devices"
        )
    return words


def _text(words: ConfigRecord, name: str) -> str:
    value = words.get(name)
    if not isinstance(value, str):
        raise ProtocolError(f"{name} is {value!r:.100}, must be text")
    return value


def _whole(words: ConfigRecord, name: str, least: int) -> int:
    value = words.get(name)
    if not _is_whole(value, least):
        raise ProtocolError(f"{name} is {value!r:.100}, must be a whole number from {least} on")
    return value


def _number(words: ConfigRecord, name: str) -> float:
    value = words.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ProtocolError(f"{name} is {value!r:.100}, must be a finite number")
    return float(value)


def _task_ids(words: ConfigRecord, name: str) -> tuple[int, ...]:
    values = words.get(name)
    if not isinstance(values, list) or not all(_is_whole(value, 0) for value in values):
        raise ProtocolError(f"{name} is {values!r:.100}, must be a list of task ids")
    return tuple(int(value) for value in values if isinstance(value, int))


def _is_whole(value: object, least: int) -> TypeGuard[int]:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and least <= value <= MAX_TASK_ID  # type: ignore[operator]


def _is_encoding(value: str) -> TypeGuard[Encoding]:
    return value in ENCODINGS


__all__ = [
    "ENCODINGS",
    "MAX_REASON",
    "MESSAGE_TYPE",
    "PROTOCOL",
    "CollectOrder",
    "Encoding",
    "Failure",
    "Order",
    "ProtocolError",
    "Reply",
    "StopOrder",
    "TaskOrder",
    "Uploads",
    "read_order",
    "read_reply",
    "size_bytes",
    "write_order",
    "write_reply",
]

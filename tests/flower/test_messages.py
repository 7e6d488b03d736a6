from __future__ import annotations

import subprocess
import sys

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from alignfed.core.reasons import RejectReason
from alignfed.flower import messages
from alignfed.flower.messages import (
    CollectOrder,
    Failure,
    Order,
    ProtocolError,
    Reply,
    StopOrder,
    TaskOrder,
    Uploads,
)


def _over_the_wire(content: RecordDict) -> RecordDict:
    return recorddict_from_proto(recorddict_to_proto(content))


@pytest.mark.parametrize(
    "order",
    [
        TaskOrder("run", "digest", 7, 3, 2, b"\x00adapter", "bf16", 5, 60.0, (1, 4)),
        TaskOrder("run", "digest", 0, 0, 0, b"x"),
        CollectOrder("run", "digest"),
        StopOrder("run", "digest", (9,)),
    ],
)
def test_an_order_survives_the_wire(order: Order) -> None:
    assert messages.read_order(_over_the_wire(messages.write_order(order))) == order


@pytest.mark.parametrize(
    "reply",
    [
        Uploads("run", {}),
        Uploads("run", {}, 0.25),
        Uploads("run", {3: b"a", 12: b"bc"}),
        Failure("run", 3, "full"),
    ],
)
def test_a_reply_survives_the_wire(reply: Reply) -> None:
    assert messages.read_reply(_over_the_wire(messages.write_reply(reply))) == reply


def _reply(**words: object) -> RecordDict:
    base: dict[str, object] = {"protocol": 1, "run": "run", "kind": "uploads", "trained": []}
    kept = {name: value for name, value in (base | words).items() if value is not None}
    return RecordDict({"alignfed": ConfigRecord(kept)})  # type: ignore[arg-type]


def _array(dtype: str, shape: tuple[int, ...], stype: str, data: bytes) -> RecordDict:
    content = _reply(trained=[1])
    content["upload-1"] = ArrayRecord({"payload": Array(dtype, shape, stype, data)})
    return content


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        _reply(protocol=2),
        _reply(protocol="1"),
        _reply(run=3),
        _reply(kind="pickle"),
        _reply(trained=None),
        _reply(trained=3),
        _reply(trained=[1.5]),
        _reply(trained=[-1]),
        _reply(trained=[1]),
        _reply(trained=[2**60]),
        _reply(kind="failed", task_id=True, reason=""),
        _reply(kind="failed", task_id=1),
        _array("float32", (1,), messages.BYTES, b"x"),
        _array("uint8", (2,), messages.BYTES, b"x"),
        _array("uint8", (1,), "numpy.ndarray", b"x"),
    ],
)
def test_a_reply_that_breaks_the_words_is_malformed(content: RecordDict) -> None:
    with pytest.raises(ProtocolError) as caught:
        messages.read_reply(content)
    assert caught.value.reason is RejectReason.MALFORMED


def test_a_record_nobody_asked_for_is_refused() -> None:
    content = messages.write_reply(Uploads("run", {1: b"x"}))
    content["upload-2"] = content["upload-1"]
    with pytest.raises(ProtocolError, match="upload-2"):
        messages.read_reply(content)


def test_a_task_listed_twice_is_refused() -> None:
    content = messages.write_reply(Uploads("run", {1: b"x"}))
    content.config_records["alignfed"]["trained"] = [1, 1]
    with pytest.raises(ProtocolError, match="different"):
        messages.read_reply(content)


def test_a_long_reason_is_cut() -> None:
    reply = messages.read_reply(messages.write_reply(Failure("run", 1, "x" * 10_000)))
    assert isinstance(reply, Failure) and len(reply.reason) == messages.MAX_REASON


def test_reading_messages_needs_no_torch() -> None:
    code = "import sys, alignfed.flower.messages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

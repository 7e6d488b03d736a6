"""What a registered device might send instead of honest work, with the reason it is refused for.

Each attack is built from an honest upload of the same task, so that one thing alone is wrong.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from alignfed.core.reasons import RejectReason
from alignfed.flower import blob, wire
from alignfed.flower.fields import FORMAT
from alignfed.flower.messages import Reply, TaskOrder, Uploads


@dataclass
class Attacker:
    """Remembers what it sent, to send it again."""

    earlier: dict[int, bytes] = field(default_factory=dict)

    def honest(self, order: TaskOrder) -> bytes:
        payload = sealed(order)
        self.earlier[order.task_id] = payload
        return payload


Attack = Callable[[Attacker, TaskOrder], Reply | RecordDict]


def sealed(
    order: TaskOrder,
    change: Callable[[str, Tensor], Tensor] = lambda name, one: one,
    rename: Callable[[str], str] = lambda name: name,
    **fields: object,
) -> bytes:
    """Return an upload with a right checksum, whatever is in it."""
    base = wire.decode_download(order.payload, max_bytes=1 << 30).adapter
    tensors = {
        rename(name): change(name, values.to(torch.float32) + 0.001)
        for name, values in wire._named(base).items()
    }
    stated = {
        "format": FORMAT,
        "kind": "upload",
        "run": order.run,
        "task_id": order.task_id,
        "base_version": order.base_version,
        "num_examples": 8,
        "encoding": "fp32",
        "metrics": {"tokens": 64.0},
    }
    return blob.pack(tensors, {**stated, **fields})


def filled(value: float) -> Callable[[str, Tensor], Tensor]:
    return lambda name, one: torch.full_like(one, value)


def _answer(order: TaskOrder, payload: bytes) -> Uploads:
    return Uploads(order.run, {order.task_id: payload})


def _longer(name: str, one: Tensor) -> Tensor:
    return torch.cat([one, one[:1]])


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (print, ("a pickle was executed",))


def _replayed(attacker: Attacker, order: TaskOrder) -> Reply:
    """Send an earlier upload for the present task; before there is one, an honest one."""
    if not attacker.earlier:
        return _answer(order, attacker.honest(order))
    return _answer(order, attacker.earlier[max(attacker.earlier)])


def _foreign(attacker: Attacker, order: TaskOrder) -> Reply:
    """Answer a task that somebody else was given: ids are handed out one after the other."""
    other = order.task_id - 1 if order.task_id else order.task_id + 1
    return Uploads(order.run, {other: sealed(order, task_id=other)})


ATTACKS: Mapping[str, tuple[Attack, frozenset[RejectReason]]] = {
    "nan": (
        lambda a, o: _answer(o, sealed(o, filled(float("nan")))),
        frozenset({RejectReason.NOT_FINITE}),
    ),
    "infinite": (
        lambda a, o: _answer(o, sealed(o, filled(float("-inf")))),
        frozenset({RejectReason.NOT_FINITE}),
    ),
    "wrong names": (
        lambda a, o: _answer(o, sealed(o, rename=lambda name: "x." + name)),
        frozenset({RejectReason.WRONG_NAMES}),
    ),
    "wrong shapes": (
        lambda a, o: _answer(o, sealed(o, _longer)),
        # Where a longer tensor makes the whole longer than any upload can be, that comes first.
        frozenset({RejectReason.WRONG_SHAPE, RejectReason.TOO_LARGE}),
    ),
    "wrong dtype": (
        lambda a, o: _answer(o, sealed(o, lambda name, one: one.to(torch.float16))),
        frozenset({RejectReason.WRONG_DTYPE}),
    ),
    "truncated": (
        lambda a, o: _answer(o, sealed(o)[:-100]),
        frozenset({RejectReason.MALFORMED}),
    ),
    "ten times too large": (
        lambda a, o: _answer(o, sealed(o) * 10 + bytes(1 << 20)),
        frozenset({RejectReason.TOO_LARGE}),
    ),
    "replayed": (_replayed, frozenset({RejectReason.WRONG_TASK})),
    "someone else's task": (
        _foreign,
        frozenset({RejectReason.WRONG_CLIENT, RejectReason.TASK_USED, RejectReason.UNKNOWN_TASK}),
    ),
    "future version": (
        lambda a, o: _answer(o, sealed(o, base_version=o.base_version + 1000)),
        frozenset({RejectReason.FUTURE_VERSION}),
    ),
    "pickle": (
        lambda a, o: _answer(o, pickle.dumps(_Trap())),
        frozenset({RejectReason.MALFORMED}),
    ),
    "norm times 1000": (
        lambda a, o: _answer(o, sealed(o, lambda name, one: one * 1000.0 + 1000.0)),
        frozenset({RejectReason.OUTLYING_NORM}),
    ),
    "changed after sealing": (
        lambda a, o: _answer(o, sealed(o)[:-1] + b"\x3f"),
        frozenset({RejectReason.WRONG_CHECKSUM}),
    ),
    "no examples": (
        lambda a, o: _answer(o, sealed(o, num_examples=0)),
        frozenset({RejectReason.NO_EXAMPLES, RejectReason.MALFORMED}),
    ),
    "metrics that are no numbers": (
        lambda a, o: _answer(o, sealed(o, metrics={"loss": "__import__('os')"})),
        frozenset({RejectReason.MALFORMED}),
    ),
    "header of a terabyte": (
        lambda a, o: _answer(o, (1 << 40).to_bytes(8, "little") + sealed(o)[8:]),
        frozenset({RejectReason.MALFORMED, RejectReason.TOO_LARGE}),
    ),
    "empty": (lambda a, o: _answer(o, b""), frozenset({RejectReason.MALFORMED})),
    "noise": (
        lambda a, o: _answer(o, bytes((i * 7919) % 256 for i in range(5000))),
        frozenset({RejectReason.MALFORMED}),
    ),
    "another run": (
        lambda a, o: _answer(o, sealed(o, run="somebody-else")),
        frozenset({RejectReason.WRONG_RUN}),
    ),
    "words that are none of ours": (
        lambda a, o: RecordDict({"alignfed": ConfigRecord({"protocol": 99, "kind": "root"})}),
        frozenset({RejectReason.MALFORMED}),
    ),
}

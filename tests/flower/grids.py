"""A grid whose nodes are functions and whose time a test moves: Flower's behaviour, scripted.

What ``flwr`` itself does is tested against its own grids elsewhere; here faults come on cue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from alignfed.core.adapter import Adapter
from alignfed.flower import messages, wire
from alignfed.flower.messages import CollectOrder, Failure, Order, Reply, TaskOrder, Uploads

RUN_ID = 77


@dataclass
class Clock:
    """Seconds that only pass when somebody sleeps."""

    now_s: float = 1000.0
    at: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        for when_s, action in [one for one in self.at if one[0] <= self.now_s]:
            self.at.remove((when_s, action))
            action()


@dataclass
class FakeDevice:
    """An honest device with an outbox; a test may overrule what it answers.

    Attributes:
        takes_s: how long a task takes.
        shift: what its training adds to every number.
        answer: replaces the honest answer; returns a reply, an error, raw content, or None for
            silence.
        step_s: what it says a local step takes it.
    """

    takes_s: float = 5.0
    shift: float = 0.01
    step_s: float | None = None
    answer: Callable[[FakeDevice, Order], Reply | Error | RecordDict | None] | None = None
    outbox: dict[int, bytes] = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)

    def take(self, content: RecordDict) -> tuple[float, Order, RecordDict | Error | None]:
        order = messages.read_order(content)
        self.orders.append(order)
        for task_id in order.acknowledged:
            self.outbox.pop(task_id, None)
        found = (self.answer or FakeDevice.honest)(self, order)
        takes_s = self.takes_s if isinstance(order, TaskOrder) else 0.5
        if isinstance(found, Uploads | Failure):
            return takes_s, order, messages.write_reply(found)
        return takes_s, order, found

    def honest(self, order: Order) -> Reply:
        if isinstance(order, TaskOrder) and order.task_id not in self.outbox:
            self.outbox[order.task_id] = self.train(order)
        step_s = None if isinstance(order, TaskOrder) else self.step_s
        return Uploads(order.run, dict(self.outbox), step_s)

    def train(self, order: TaskOrder, **changes: object) -> bytes:
        self.trained.append(order.task_id)
        base = wire.decode_download(order.payload, max_bytes=1 << 30).adapter
        moved = Adapter(base.layout, {dtype: b + self.shift for dtype, b in base.buffers.items()})
        claims = wire.Claims(
            order.run, order.task_id, order.base_version, 8, order.encoding, {"tokens": 10.0}
        )
        payload, _ = wire.encode_upload(replace(claims, **changes), moved, base)  # type: ignore[arg-type]
        return payload


class ScriptedGrid(Grid):
    """Nodes answer when their time has come; some are offline, some never answer."""

    def __init__(self, clock: Clock, devices: dict[int, FakeDevice]) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, 1, 1
        self.clock = clock
        self.devices = devices
        self.online = set(devices)
        self.activated: dict[int, int] = dict.fromkeys(devices, 1)
        self.refuses_push = False
        self.pushed: list[tuple[int, Order]] = []
        self._due: list[tuple[float, Message]] = []
        self._count = 0

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *args: object, **kwargs: object) -> Iterable[Message]:
        raise AssertionError("a driver must never wait for a round")

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.online)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=node, last_activated_at=str(self.activated[node]))
            for node in sorted(self.online)
        ]

    def push_messages(self, messages_: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages_:
            node_id = message.metadata.dst_node_id
            assert node_id in self.online, "a message went to a node that is offline"
            if self.refuses_push:
                continue
            self._count += 1
            message.metadata.__dict__["_message_id"] = f"m{self._count}"
            ids.append(f"m{self._count}")
            takes_s, order, answer = self.devices[node_id].take(message.content)
            self.pushed.append((node_id, order))
            if answer is None:
                continue
            reply = (
                Message(error=answer, reply_to=message)
                if isinstance(answer, Error)
                else Message(content=answer, reply_to=message)
            )
            self._due.append((self.clock.now_s + takes_s, reply))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        ready = [
            (at_s, reply)
            for at_s, reply in self._due
            if at_s <= self.clock.now_s and reply.metadata.reply_to_message_id in wanted
        ]
        self._due = [one for one in self._due if one not in ready]
        return [reply for _, reply in ready]

    def restart(self, node_id: int) -> None:
        """Kill a node's process and start it again: what it was sent is forgotten."""
        self.activated[node_id] += 1
        self._due = [
            (at_s, reply) for at_s, reply in self._due if reply.metadata.src_node_id != node_id
        ]


@dataclass
class Everybody:
    """Node ``n`` is client ``n - first``; some are shut out."""

    first: int = 100
    revoked: set[int] = field(default_factory=set)

    def client_of(self, node_id: int) -> int | None:
        return None if node_id in self.revoked else node_id - self.first


def nan_like(adapter: Adapter) -> Adapter:
    """Return an adapter of NaN."""
    buffers = {d: torch.full_like(b, float("nan")) for d, b in adapter.buffers.items()}
    return Adapter(adapter.layout, buffers)


__all__ = ["Clock", "CollectOrder", "Everybody", "FakeDevice", "ScriptedGrid", "nan_like"]

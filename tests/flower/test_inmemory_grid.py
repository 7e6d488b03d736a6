"""The driver on Flower's own in-memory grid: real link state, real messages, real time."""

from __future__ import annotations

import itertools
import secrets
import time
from pathlib import Path

from flwr.app import Error, Message
from flwr.common.constant import HEARTBEAT_INTERVAL_INF, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.proto.task_pb2 import Task as FlowerTask
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from alignfed.flower.dialect import AlignFedDialect
from alignfed.flower.driver import Driver, DriverParts, DriverSettings
from alignfed.flower.members import FirstComeMembers
from alignfed.flower.messages import CollectOrder, write_order
from alignfed.flower.orders import Patience
from alignfed.flower.pace import PaceSettings
from alignfed.flower.post import ABSENT, PostOffice, Sent
from alignfed.journal import DurableLog, RunMeta, RunReader
from tests.core.adapters import make_adapter
from tests.flower.grids import FakeDevice
from tests.flower.servers import evaluate, make_coordinator

RUN_ID = 41


class Engine:
    """Nodes on an in-memory grid. A device whose ``answer`` returns None stays silent."""

    def __init__(self, devices: list[FakeDevice]) -> None:
        factory = LinkStateFactory(
            FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()
        )
        self.grid = InMemoryGrid(factory)
        self.state = self.grid.state
        run = Run.create_empty(RUN_ID)
        run.primary_task_id, run.federation_id = RUN_ID, NOOP_FEDERATION_ID
        self.state.run_ids[RUN_ID] = RunRecord(run=run)
        self.state.task_store[RUN_ID] = FlowerTask(task_id=RUN_ID, run_id=RUN_ID)
        self.grid.set_run(run)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, 1, RUN_ID
        self.devices = {self._register(): device for device in devices}
        self._count = itertools.count()

    def _register(self) -> int:
        node_id = self.state.create_node(
            NOOP_FLWR_AID,
            NOOP_ACCOUNT_NAME,
            secrets.token_bytes(32),
            heartbeat_interval=HEARTBEAT_INTERVAL_INF,
        )
        self.state.acknowledge_node_heartbeat(node_id, HEARTBEAT_INTERVAL_INF)
        return int(node_id)

    def look(self, seconds: float) -> None:
        """Let every device take what was sent to it; called where the driver would sleep."""
        for node_id, device in self.devices.items():
            for message in self.state.get_message_ins(node_id, limit=1):
                _, _, answer = device.take(message.content)
                if answer is None:
                    continue
                reply = (
                    Message(error=answer, reply_to=message)
                    if isinstance(answer, Error)
                    else Message(content=answer, reply_to=message)
                )
                reply.metadata.__dict__["_message_id"] = f"reply-{next(self._count)}"
                assert self.state.store_message_res(reply)


def drive(root: Path, engine: Engine, uploads: int, settings: DriverSettings) -> Driver:
    coordinator = make_coordinator(uploads=uploads, concurrency=len(engine.devices))
    adapter = make_adapter()
    with DurableLog.create(root, RunMeta("test", "sha", 0), coordinator, adapter) as log:
        parts = DriverParts(
            coordinator=log.coordinator,
            grid=engine.grid,
            log=log,
            dialect=AlignFedDialect("run", "digest", "fp32", coordinator.exchange),
            members=FirstComeMembers(),
            clock=time.monotonic,
            sleep=engine.look,
            evaluate=evaluate,
            settings=settings,
        )
        driver = Driver(parts, log.coordinator.initial_state(adapter), "run", None)
        driver.run()
        driver.checkpoint()
    return driver


def test_a_run_leaves_nothing_in_the_grid(tmp_path: Path) -> None:
    engine = Engine([FakeDevice() for _ in range(3)])
    drive(tmp_path, engine, 12, DriverSettings(start_clients=3))
    with RunReader(tmp_path) as reader:
        assert reader.outcomes()["applied"] == 12
    assert not engine.state.message_ins_store and not engine.state.message_res_store
    assert all(not device.outbox for device in engine.devices.values())


def test_a_message_that_ends_unanswered_disturbs_no_other(tmp_path: Path) -> None:
    silent = FakeDevice(answer=lambda device, order: None)
    engine = Engine([FakeDevice(), silent])
    settings = DriverSettings(
        start_clients=2,
        roll_call_s=0.05,
        closing_s=0.2,
        patience=Patience(resends=0),
        pace=PaceSettings(first_ttl_s=0.4, min_ttl_s=0.4),
    )
    look = engine.look

    def slowly(seconds: float) -> None:
        time.sleep(0.02)  # the silent one's message ends while the other goes on answering
        look(seconds)

    engine.look = slowly  # type: ignore[method-assign]
    driver = drive(tmp_path, engine, 60, settings)
    with RunReader(tmp_path) as reader:
        assert reader.outcomes()["applied"] == 60
    errors = [client.last_error for client in driver.status.clients.values()]
    assert any("Flower error 3" in error for error in errors)


def test_flower_reports_a_message_that_has_ended() -> None:
    engine = Engine([FakeDevice()])
    (node_id,) = engine.devices
    post = PostOffice(engine.grid, "train")
    post.nodes()
    sent = Sent(node_id, 0, None, 0.0, 0.05)
    assert post.push(sent, write_order(CollectOrder("run", "digest")))
    time.sleep(0.1)
    (reply,) = post.fetch(-10.0)
    assert reply.sent == sent and reply.content is None and reply.code == ABSENT
    assert not post.busy(node_id)

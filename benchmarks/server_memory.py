"""Whether a server's memory stays flat while uploads come and go.

    python benchmarks/server_memory.py [--uploads 2000] [--megabytes 4] [--clients 8]

The real driver, coordinator and durable record serve devices on Flower's own in-memory grid; each
upload carries an adapter of `--megabytes` (fp32) and is on disk before it is acknowledged. Devices
cost nothing: they add a little to what they were sent. Resident memory is read after every upload;
`growth` is its mean over the last half of the run above that over the first half. The first tenth,
in which caches fill, is left out of both. `disk_mb` is what the run's directory holds at the end.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch
from flwr.app import Message
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
from measure import publish, rss_bytes

from alignfed.core.adapter import Adapter, LoraFactors
from alignfed.core.aggregation import make_rule
from alignfed.core.coordinator import Coordinator
from alignfed.core.lora import make_lora_rule
from alignfed.core.state import CoordinatorSettings, StopConditions
from alignfed.flower import messages, wire
from alignfed.flower.dialect import AlignFedDialect
from alignfed.flower.driver import Driver, DriverParts, DriverSettings
from alignfed.flower.members import FirstComeMembers
from alignfed.flower.messages import TaskOrder, Uploads
from alignfed.journal import DurableLog, RunMeta

RANK = 16


class Nodes:
    """Devices on an in-memory grid; each answers what it finds when it is told to look."""

    def __init__(self, grid: InMemoryGrid, count: int) -> None:
        self.state = grid.state
        self.ids = [
            self.state.create_node(
                NOOP_FLWR_AID,
                NOOP_ACCOUNT_NAME,
                node.to_bytes(32, "big"),
                heartbeat_interval=HEARTBEAT_INTERVAL_INF,
            )
            for node in range(count)
        ]
        for node_id in self.ids:
            self.state.acknowledge_node_heartbeat(node_id, HEARTBEAT_INTERVAL_INF)
        self.kept: dict[int, dict[int, bytes]] = {node_id: {} for node_id in self.ids}

    def look(self) -> None:
        for node_id in self.ids:
            for message in self.state.get_message_ins(node_id, limit=1):
                order = messages.read_order(message.content)
                kept = self.kept[node_id]
                for task_id in order.acknowledged:
                    kept.pop(task_id, None)
                if isinstance(order, TaskOrder):
                    kept[order.task_id] = train(order)
                content = messages.write_reply(Uploads(order.run, dict(kept)))
                reply = Message(content=content, reply_to=message)
                reply.metadata.__dict__["_message_id"] = f"r{message.metadata.message_id}"
                assert self.state.store_message_res(reply)


def train(order: TaskOrder) -> bytes:
    base = wire.decode_download(order.payload, max_bytes=1 << 30).adapter
    moved = Adapter(base.layout, {d: one + 1e-3 for d, one in base.buffers.items()})
    claims = wire.Claims(order.run, order.task_id, order.base_version, 8, order.encoding, {})
    return wire.encode_upload(claims, moved, base)[0]


def make_grid() -> InMemoryGrid:
    factory = LinkStateFactory(
        FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()
    )
    grid = InMemoryGrid(factory)
    run = Run.create_empty(7)
    run.primary_task_id, run.federation_id = 7, NOOP_FEDERATION_ID
    grid.state.run_ids[7] = RunRecord(run=run)
    grid.state.task_store[7] = FlowerTask(task_id=7, run_id=7)
    grid.set_run(run)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 7
    return grid


def make_adapter(megabytes: float) -> Adapter:
    width = 1024
    layers = max(1, round(megabytes * 1e6 / (4 * 2 * width * RANK)))
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"layer{i:04d}": LoraFactors(
            torch.randn(RANK, width, generator=generator), torch.zeros(width, RANK), 2.0 * RANK
        )
        for i in range(layers)
    }
    return Adapter.pack(factors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uploads", type=int, default=2000)
    parser.add_argument("--megabytes", type=float, default=4.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rule", default="fedbuff")
    parser.add_argument("--checkpoint-s", type=float, default=10.0)
    options = parser.parse_args()
    adapter = make_adapter(options.megabytes)
    coordinator = Coordinator(
        CoordinatorSettings(
            options.clients,
            max(1, options.clients // 2),
            max_norm_ratio=math.inf,
            stop=StopConditions(max_uploads=options.uploads),
        ),
        make_rule(options.rule),
        make_lora_rule("factor"),
    )
    grid = make_grid()
    nodes = Nodes(grid, options.clients)
    seen: list[int] = []
    with tempfile.TemporaryDirectory(prefix="alignfed-memory-") as folder:
        log = DurableLog.create(Path(folder), RunMeta("benchmark", "none", 0), coordinator, adapter)
        parts = DriverParts(
            coordinator=log.coordinator,
            grid=grid,
            log=log,
            dialect=AlignFedDialect("memory", "digest", "fp32", coordinator.exchange),
            members=FirstComeMembers(),
            clock=time.monotonic,
            sleep=time.sleep,
            settings=DriverSettings(
                start_clients=options.clients,
                checkpoint_s=options.checkpoint_s,
            ),
        )
        driver = Driver(parts, log.coordinator.initial_state(adapter), "memory", None)
        began_s = time.monotonic()
        while driver.step():
            nodes.look()
            while len(seen) < driver.state.received:
                seen.append(rss_bytes())
        wall_s = time.monotonic() - began_s
        log.checkpoint(driver.state)
        disk_mb = sum(one.stat().st_size for one in Path(folder).rglob("*") if one.is_file()) / 1e6
        log.close()
    kept = seen[len(seen) // 10 :]
    half = len(kept) // 2
    first, last = mean(kept[:half]), mean(kept[half:])
    publish(
        "server_memory",
        {
            "uploads": driver.state.received,
            "applied_versions": driver.state.version,
            "upload_mb": adapter.size_bytes / 1e6,
            "uploads_per_s": driver.state.received / wall_s,
            "first_half_mb": first / 1e6,
            "last_half_mb": last / 1e6,
            "growth": last / first - 1.0,
            "peak_mb": max(seen) / 1e6,
            "disk_mb": disk_mb,
            "messages_left_in_grid": len(grid.state.message_ins_store),
        },
    )


if __name__ == "__main__":
    main()

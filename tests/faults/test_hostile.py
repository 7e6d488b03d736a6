"""A registered device turns hostile: all it sends is refused with a reason, and nobody suffers.

200 uploads go through the driver on a grid whose time a test moves; a round of all attacks goes
through real processes, from a SuperNode with a registered key to a ServerApp.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from alignfed.deploy.supervisor import Program
from alignfed.flower.messages import Order, TaskOrder, Uploads
from alignfed.journal import RunReader
from tests.faults.attacks import ATTACKS, Attacker
from tests.faults.federation import Federation, small_recipe, until
from tests.faults.records import check_record
from tests.flower.grids import FakeDevice
from tests.flower.servers import make_coordinator, serve

HOSTILE_UPLOADS = 200
ATTACKING_NODE, ATTACKING_CLIENT = 100, 0


def test_two_hundred_hostile_uploads_change_nothing_and_each_has_its_reason(tmp_path: Path) -> None:
    attacker, sent = Attacker(), []
    turn = itertools.cycle(ATTACKS)

    def attack(device: FakeDevice, order: Order) -> object:
        if not isinstance(order, TaskOrder):
            return Uploads(order.run, {})
        if not attacker.earlier:  # one honest upload first, so that there is one to replay
            return Uploads(order.run, {order.task_id: attacker.honest(order)})
        sent.append(next(turn))
        return ATTACKS[sent[-1]][0](attacker, order)

    coordinator = make_coordinator(uploads=2000, concurrency=3, max_backoff_s=1.0)
    server = serve(tmp_path, 3, coordinator)
    server.devices[ATTACKING_NODE].answer = attack  # type: ignore[assignment]
    server.devices[ATTACKING_NODE].takes_s = 2.0
    while len(sent) <= HOSTILE_UPLOADS:
        server.run_for(60.0)
    server.log.checkpoint(server.driver.state)
    server.log.close()
    with RunReader(tmp_path) as reader:
        mine = [one for one in reader.uploads() if one.client_id == ATTACKING_CLIENT]
        others = Counter(one.outcome for one in reader.uploads() if one.client_id in (1, 2))
    assert [one.outcome for one in mine[:1]] in (["applied"], ["buffered"])
    refused = mine[1:]
    assert len(refused) >= HOSTILE_UPLOADS
    assert {one.outcome for one in refused} == {"rejected"}
    for name, one in zip(sent, refused, strict=False):
        assert one.reason in ATTACKS[name][1], f"{name}: {one.reason} ({one.detail})"
        assert one.detail
    assert set(Counter(sent)) == set(ATTACKS)
    assert others["rejected"] == 0
    assert others["applied"] > HOSTILE_UPLOADS / 4
    for buffer in server.driver.state.adapter.buffers.values():
        assert torch.isfinite(buffer).all()
        assert buffer.abs().max() < 1000


@pytest.mark.slow
def test_attacks_by_a_real_node_with_a_registered_key_change_nothing(tmp_path: Path) -> None:
    recipe = small_recipe(2, "stop.uploads=28", "training.steps=2", "server.max_backoff_s=1.0")
    with Federation(tmp_path / "server", 2, recipe) as federation:
        federation.start_device(0)
        device, settings = federation._device(1, None)
        _, honest_client, supernode = federation.programs(1)
        hostile = Program(
            "d1-hostile",
            (sys.executable, str(Path(__file__).parent / "hostile_device.py"), str(device.root)),
            honest_client.folder,
            {**honest_client.environment, "PYTHONPATH": _python_path()},
        )
        federation._start([hostile, supernode])
        until(lambda: federation.failure or federation.host.completed, 400)
        assert federation.failure is None
        check_record(federation.run, federation.finished_tasks())
        with RunReader(federation.run) as reader:
            uploads = list(reader.uploads())
        mine = [one for one in uploads if one.client_id == settings.client]
        assert len(mine) >= 5
        assert {one.outcome for one in mine} == {"rejected"}
        assert all(one.reason and one.detail for one in mine)
        honest = [one for one in uploads if one.client_id == 0]
        assert {one.outcome for one in honest} <= {"applied", "buffered", "rejected"}
        assert {one.reason for one in honest if one.reason} <= {"run_stopped"}
        assert federation.running("superlink").restarts == 0
        assert federation.host.supervisor.running["proxy"].restarts == 0


def _python_path() -> str:
    root = str(Path(__file__).parents[2])
    return os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))

"""A device's client process gone over to the other side: every task is answered by an attack."""

from __future__ import annotations

import itertools
import logging
import sys
import tomllib
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from alignfed.deploy.directory import DeviceDirectory
from alignfed.flower.messages import TaskOrder, Uploads, read_order, write_reply
from alignfed.flower.warm_client import WarmClient
from tests.faults.attacks import ATTACKS, Attacker

logging.basicConfig(level=logging.INFO)
attacker, turn = Attacker(), itertools.cycle(name for name in ATTACKS if name != "replayed")


def answer(message: Message, context: Context) -> Message:
    order = read_order(message.content)
    if not isinstance(order, TaskOrder):
        return Message(write_reply(Uploads(order.run, {})), reply_to=message)
    name = next(turn)
    logging.info("attack: %s", name)
    reply = ATTACKS[name][0](attacker, order)
    content = reply if isinstance(reply, RecordDict) else write_reply(reply)
    return Message(content, reply_to=message)


directory = DeviceDirectory(Path(sys.argv[1]))
port = tomllib.loads(directory.settings.read_text())["runtime_port"]
WarmClient(f"127.0.0.1:{port}", answer, directory.runtime_secret.read_bytes()).serve()

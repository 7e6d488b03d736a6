"""Our client app for Flower's simulation engine: the trainer lives in the engine's own workers."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from alignfed.config import Recipe
from alignfed.deploy.device import Device, build_device
from alignfed.flower.client_app import ClientSide
from alignfed.flower.messages import TaskOrder
from alignfed.flower.outbox import Outbox
from alignfed.flower.training_socket import NotTrained, Trained


class InProcessTrainer:
    """Trains where it is called, with the device's own code."""

    def __init__(self, device: Device, outbox: Outbox) -> None:
        self.device, self.outbox = device, outbox

    def train(self, order: TaskOrder) -> Trained | NotTrained:
        self.device.work(order, self.outbox)
        return Trained()


def finder(recipe: Recipe, root: Path) -> Callable[[Context], ClientSide]:
    """Return what finds a node's device: its partition is its client, its outbox is in ``root``."""

    def find(context: Context) -> ClientSide:
        return _side(recipe.to_toml(), root, int(context.node_config["partition-id"]))

    return find


@lru_cache(maxsize=8)
def _side(text: str, root: Path, client_id: int) -> ClientSide:
    recipe = Recipe.model_validate(tomllib.loads(text))
    outbox = Outbox(root / f"outbox-{client_id}.sqlite", 1 << 28)
    device = build_device(recipe, client_id)
    return ClientSide(outbox, InProcessTrainer(device, outbox), lambda: device.step_s)

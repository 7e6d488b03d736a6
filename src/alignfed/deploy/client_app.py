"""The Flower ClientApp of a device: ``alignfed.deploy.client_app:app``.

It finds the device's directory by the SuperNode's node config (``alignfed-directory``) or, without
one, by the environment (``ALIGNFED_DEVICE_DIRECTORY``). No torch here.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context

from alignfed.deploy.directory import DEVICE_DIRECTORY, DeviceDirectory
from alignfed.deploy.trainer_status import read_status
from alignfed.errors import DeploymentError
from alignfed.flower.client_app import ClientSide, make_app
from alignfed.flower.outbox import Outbox
from alignfed.flower.training_socket import TrainerClient

NODE_CONFIG = "alignfed-directory"


def client_side(directory: DeviceDirectory) -> ClientSide:
    """Return what answers for the device of a directory.

    Raises:
        DeploymentError: its outbox cannot be opened.
    """
    outbox = Outbox(directory.outbox / "outbox.sqlite")
    return ClientSide(
        outbox,
        TrainerClient(directory.trainer_socket),
        lambda: read_status(directory.status).step_s,
    )


def _find(context: Context) -> ClientSide:
    root = context.node_config.get(NODE_CONFIG) or os.environ.get(DEVICE_DIRECTORY)
    if not root:
        raise DeploymentError(
            f"this SuperNode does not know its device: start it with `alignfed deploy device`, or"
            f" with --node-config '{NODE_CONFIG}=\"/path/of/the/device\"'"
        )
    return client_side(DeviceDirectory(Path(str(root))))


app = make_app(_find)

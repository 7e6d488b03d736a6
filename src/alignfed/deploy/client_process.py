"""The process that answers for a device: it stays, and is light (no torch).

Started as ``python -m alignfed.deploy.client_process DIRECTORY`` beside a SuperNode that runs with
``--isolation process``; it answers that SuperNode's messages from the outbox and by the trainer.
Code that comes with a message is not run.
"""

from __future__ import annotations

import logging
import sys
import tomllib
from pathlib import Path

from flwr.app import Context, Message

from alignfed.deploy.client_app import client_side
from alignfed.deploy.directory import DeviceDirectory
from alignfed.errors import AlignFedError, DeploymentError
from alignfed.flower.client_app import answer_message
from alignfed.flower.warm_client import WarmClient


def serve(directory: DeviceDirectory) -> None:
    """Answer for a device until the process ends.

    Raises:
        DeploymentError: settings, outbox or secret cannot be read.
    """
    try:
        # Read bare: validating costs more imports than all the rest, and the trainer does it.
        port = tomllib.loads(directory.settings.read_text("utf-8")).get("runtime_port", 9094)
        secret = directory.runtime_secret.read_bytes()
    except (OSError, ValueError) as error:
        raise DeploymentError(f"{directory.root} cannot be read: {error}") from error
    side = client_side(directory)

    def answer(message: Message, context: Context) -> Message:
        return answer_message(side, message)

    note = directory.state / "message"
    WarmClient(f"127.0.0.1:{port}", answer, secret, note).serve()


def main(arguments: list[str]) -> int:
    """Run the client process of the directory named; return an exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if len(arguments) != 1:
        print("usage: python -m alignfed.deploy.client_process DIRECTORY", file=sys.stderr)
        return 2
    try:
        serve(DeviceDirectory(Path(arguments[0])))
    except AlignFedError as error:
        logging.getLogger("alignfed.client").error("%s", error)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

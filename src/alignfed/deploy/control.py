"""Flower's control API, as far as a deployment needs it: nodes and runs. Loopback only.

This is what ``flwr run`` and ``flwr supernode register`` call; calling it here spares a process of
several seconds for each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from alignfed.deploy.directory import ServerDirectory
from alignfed.deploy.pki import flower_public_key, read_public_key
from alignfed.deploy.settings import ServerSettings
from alignfed.errors import DeploymentError

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class FlowerNode:
    """A node as Flower sees it: ``status`` is registered, online, offline or unregistered."""

    node_id: int
    public_key: bytes
    status: str


@dataclass(frozen=True, slots=True)
class FlowerRun:
    """A run as Flower sees it.

    Attributes:
        status: pending, starting, running or finished.
        outcome: of a finished one: completed, failed or stopped.
        details: why it failed, where Flower says so.
    """

    run_id: int
    status: str
    outcome: str
    details: str

    @property
    def finished(self) -> bool:
        """Whether it is over, however it ended."""
        return self.status == "finished"


class Control:
    """A connection to a SuperLink's control API."""

    def __init__(self, client: ControlHttpClient, address: str) -> None:
        """Use a client; ``connected`` makes one."""
        self._client = client
        self._address = address

    def register(self, public_key: str) -> int:
        """Make a device known, if it is not; return its node id.

        Args:
            public_key: an OpenSSH line.

        Raises:
            DeploymentError: Flower refuses, or cannot be reached.
        """
        pem = flower_public_key(read_public_key(public_key, "the device's key"))
        for node in self.nodes():
            if node.public_key == pem and node.status != "unregistered":
                return node.node_id
        request = RegisterNodeRequest(public_key=pem)
        return self._call(lambda: self._client.RegisterNode(request)).node_id

    def unregister(self, node_id: int) -> None:
        """Make a node unknown; Flower then refuses whatever it asks. Known no longer: nothing.

        Raises:
            DeploymentError: Flower refuses, or cannot be reached.
        """
        known = {node.node_id for node in self.nodes() if node.status != "unregistered"}
        if node_id in known:
            request = UnregisterNodeRequest(node_id=node_id)
            self._call(lambda: self._client.UnregisterNode(request))

    def nodes(self) -> list[FlowerNode]:
        """Return all nodes Flower knows.

        Raises:
            DeploymentError: Flower cannot be reached.
        """
        answer = self._call(lambda: self._client.ListNodes(ListNodesRequest()))
        return [FlowerNode(one.node_id, one.public_key, one.status) for one in answer.nodes_info]

    def start_run(self, app: Path, config: Mapping[str, str | int | float | bool]) -> int:
        """Have an app run, and return the run's id.

        Args:
            app: folder of a Flower app.
            config: its run configuration.

        Raises:
            DeploymentError: Flower refuses, or cannot be reached.
        """
        content = build_fab_from_disk(app)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        request = StartRunRequest(
            fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config))
        )
        return self._call(lambda: self._client.StartRun(request)).run_id

    def stop_run(self, run_id: int) -> None:
        """End a run that has not ended.

        Raises:
            DeploymentError: Flower refuses, or cannot be reached.
        """
        if not self.run(run_id).finished:
            self._call(lambda: self._client.StopRun(StopRunRequest(run_id=run_id)))

    def run(self, run_id: int) -> FlowerRun:
        """Return what Flower says of a run.

        Raises:
            DeploymentError: there is no such run, or Flower cannot be reached.
        """
        answer = self._call(lambda: self._client.ListRuns(ListRunsRequest(run_id=run_id)))
        if run_id not in answer.run_dict:
            raise DeploymentError(f"Flower knows no run {run_id}", run_id=run_id)
        status = answer.run_dict[run_id].status
        return FlowerRun(run_id, status.status, status.sub_status, status.details)

    def closing_log(self, run_id: int) -> str:
        """Return what a finished run's ServerApp printed; Flower then forgets its messages.

        Raises:
            DeploymentError: the run is not finished, or Flower cannot be reached.
        """
        if not self.run(run_id).finished:
            raise DeploymentError(f"run {run_id} goes on; its log has no end yet", run_id=run_id)
        request = StreamLogsRequest(run_id=run_id, after_timestamp=0.0)
        pieces = self._call(lambda: list(self._client.StreamLogs(request)))
        return "".join(piece.log_output for piece in pieces)

    def _call(self, call: Callable[[], _Answer]) -> _Answer:
        try:
            return call()
        except httpx.HTTPStatusError as error:
            known = FlowerError.from_json(error.response.text)
            words = f"[{known.code}] {known.message}" if known else error.response.text[:300]
            raise DeploymentError(
                f"Flower's SuperLink refuses ({error.response.status_code}): {words}",
                status=error.response.status_code,
            ) from error
        except httpx.HTTPError as error:
            raise DeploymentError(
                f"Flower's SuperLink at {self._address} cannot be reached"
                f" ({type(error).__name__}: {error}); is alignfed deploy server running?",
                address=self._address,
            ) from error


@contextmanager
def connected(directory: ServerDirectory, settings: ServerSettings) -> Iterator[Control]:
    """Connect to the SuperLink of a server's directory, on this machine."""
    address = f"127.0.0.1:{settings.superlink_port}"
    client = ControlHttpClient.from_server_address(
        server_address=address,
        insecure=False,
        root_certificates=directory.ca_certificate.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield Control(client, address)
    finally:
        client.close()

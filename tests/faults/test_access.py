"""Who may do what with a running server, tried with Flower's own programs on real sockets."""

import datetime
import os
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from alignfed.deploy import pki
from alignfed.deploy.registry import load_registry, update_registry
from alignfed.deploy.up import free_ports
from tests.faults.federation import Federation, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    with Federation(tmp_path_factory.mktemp("access") / "server", devices=2) as running:
        yield running


def supernode(federation, *arguments):
    """Run Flower's own command until it ends; return its exit code and what it said."""
    program = federation.host.supervisor.running["superlink"].program
    command = program.command[0].replace("superlink", "supernode")
    # Into a file: its children keep a pipe open for as long as nobody has taken note of its end.
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.run(
            [command, "--max-retries", "1", "--max-wait-time", "10", *arguments],
            env={**os.environ, **program.environment},
            stdout=said,
            stderr=said,
            timeout=90,
        )
        said.seek(0)
        return process.returncode, said.read()


def control(federation, port):
    return ControlHttpClient.from_server_address(
        server_address=f"127.0.0.1:{port}",
        insecure=False,
        root_certificates=federation.directory.ca_certificate.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )


def test_a_device_that_holds_the_ca_certificate_cannot_call_the_control_api(federation):
    key = pki.flower_public_key(pki.read_public_key(pki.make_device_key()[1], "key"))
    client = control(federation, federation.settings.port)
    for call in (
        lambda: client.ListRuns(ListRunsRequest()),
        lambda: client.ListNodes(ListNodesRequest()),
        lambda: client.StartRun(StartRunRequest()),
        lambda: client.RegisterNode(RegisterNodeRequest(public_key=key)),
    ):
        with pytest.raises(httpx.HTTPStatusError) as refused:
            call()
        assert refused.value.response.status_code == 403
    client.close()
    inside = control(federation, federation.settings.superlink_port)
    assert len(inside.ListNodes(ListNodesRequest()).nodes_info) == 2, "on loopback it works"
    inside.close()


def test_only_the_proxy_listens_where_devices_are(federation):
    addresses = {
        (connection.laddr.ip, connection.laddr.port)
        for name in ("superlink", "proxy", "superexec")
        for connection in psutil.Process(federation.running(name).process.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    settings = federation.settings
    assert (settings.bind, settings.port) in addresses
    assert ("127.0.0.1", settings.superlink_port) in addresses
    assert {ip for ip, _ in addresses} == {"127.0.0.1"}


def arguments(federation, *, key, authority):
    settings = federation.settings
    return (
        "--superlink", f"127.0.0.1:{settings.port}",
        "--root-certificates", str(authority),
        "--auth-supernode-private-key", str(key),
        "--port", str(free_ports(1)[0]),
    )  # fmt: skip


def test_an_unregistered_key_is_refused(federation, tmp_path):
    private, _ = pki.make_device_key()
    pki.write_secret(tmp_path / "k", private)
    known = federation.directory.ca_certificate
    _, said = supernode(federation, *arguments(federation, key=tmp_path / "k", authority=known))
    assert "SuperNode ID" not in said
    assert '"unregistered"' in Path(federation.directory.logs / "proxy.log").read_text()
    assert len(federation.statuses()) == 2


def test_without_tls_and_with_a_wrong_authority_nothing_is_exchanged(federation, tmp_path):
    stranger = pki.make_authority("stranger", datetime.datetime.now(datetime.UTC))
    pki.write_public(tmp_path / "ca.crt", pki.certificate_text(stranger.certificate))
    key = federation.devices[1].key
    wrong = arguments(federation, key=key, authority=tmp_path / "ca.crt")
    code, said = supernode(federation, *wrong)
    assert code == 1
    assert "SuperNode ID" not in said
    assert "certificate" in said.lower() or "SSL" in said
    plain = (
        "--insecure",
        "--superlink",
        f"127.0.0.1:{federation.settings.port}",
        "--port",
        str(free_ports(1)[0]),
    )
    code, said = supernode(federation, *plain)
    assert code == 1
    assert "SuperNode ID" not in said


def test_a_revoked_device_is_cut_off_at_once_and_stays_out(federation):
    name = federation.start_supernode(0)
    until(lambda: "SuperNode ID" in federation.log(name))
    registry = load_registry(federation.directory.registry)
    node_id = registry.named("d0").node_id
    until(lambda: federation.statuses()[node_id] == "online")
    until(lambda: len(federation.replies()) > 0)
    update_registry(federation.directory.registry, lambda known: known.without("d0", time.time()))
    until(lambda: federation.statuses().get(node_id, "unregistered") == "unregistered", 10)
    until(lambda: not federation.running(name).alive or federation.running(name).restarts, 30)
    refusals = Path(federation.directory.logs / "proxy.log").read_text()
    assert '"reason": "revoked"' in refusals
    until(lambda: federation.running(name).restarts >= 1, 30)
    time.sleep(5)
    before = len(federation.replies())
    time.sleep(3)
    assert len(federation.replies()) == before
    # The whole log: its last lines are those of starts that were refused.
    said = (federation.directory.logs / f"{name}.log").read_text()
    assert said.count("SuperNode ID") == 1, "its second start was refused"

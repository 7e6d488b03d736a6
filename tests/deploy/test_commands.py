"""`alignfed deploy` on the command line: what it makes, shows and refuses, without any process."""

import datetime
import json
import os
import socket
import stat
import time
import tomllib
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from alignfed.cli import app
from alignfed.config import default_recipe, load_recipe
from alignfed.deploy.creating import create_server
from alignfed.deploy.directory import DeviceDirectory, ServerDirectory
from alignfed.deploy.metrics import Endpoint
from alignfed.deploy.pki import days_left, make_device_key, read_certificate
from alignfed.deploy.records import write_json
from alignfed.deploy.registry import load_registry, update_registry
from alignfed.deploy.settings import load_device_settings, load_server_settings
from alignfed.deploy.status import server_picture, status_document
from alignfed.deploy.up import free_ports, recipe_for
from alignfed.errors import DeploymentError
from alignfed.flower.status import ServerStatus


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["deploy", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def server(tmp_path):
    run("init", tmp_path / "fl", "--host", "fl.example.org", "--host", "192.0.2.10")
    return ServerDirectory(tmp_path / "fl")


def test_init_makes_everything_a_server_needs_and_never_twice(server):
    settings = load_server_settings(server.settings)
    assert settings.hosts == ("fl.example.org", "192.0.2.10")
    assert load_recipe(server.recipe) == default_recipe()
    for secret in (server.ca_key, server.proxy_key, server.superlink_key, server.superexec_secret):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    unit = (server.systemd / "alignfed-server.service").read_text()
    assert f"deploy server {server.root.resolve()}" in unit
    before = server.ca_key.read_bytes()
    said = run("init", server.root, "--host", "other.example.org", code=2)
    assert "holds a deployment already" in said
    assert server.ca_key.read_bytes() == before


def test_a_devices_directory_is_complete_and_holds_nothing_of_the_servers(server):
    said = run("add-device", server.root, "phone-1", "--data", "/my/data.jsonl")
    assert "copy" in said
    device = server.device("phone-1")
    settings = load_device_settings(device.settings)
    assert (settings.name, settings.client) == ("phone-1", 0)
    assert settings.server == "fl.example.org:9443"
    assert settings.data == "/my/data.jsonl"
    assert device.recipe.read_bytes() == server.recipe.read_bytes()
    assert device.ca_certificate.read_bytes() == server.ca_certificate.read_bytes()
    assert stat.S_IMODE(device.key.stat().st_mode) == 0o600
    carried = b"".join(path.read_bytes() for path in device.root.rglob("*") if path.is_file())
    for secret in (server.ca_key, server.proxy_key, server.superexec_secret):
        assert secret.read_bytes() not in carried
    assert load_registry(server.registry).named("phone-1").public_key in carried.decode()


def test_a_key_made_on_the_device_never_comes_to_the_server(server, tmp_path):
    private, line = make_device_key()
    (tmp_path / "node.key.pub").write_text(line + " me@laptop\n")
    said = run("add-device", server.root, "laptop", "--public-key", tmp_path / "node.key.pub")
    assert "private key" in said
    device = server.device("laptop")
    assert not device.key.exists()
    assert "private half" in run("device", device.root, code=2)
    device.key.write_bytes(private)
    device.key.chmod(0o644)
    assert "chmod 600" in run("device", device.root, code=2)


def test_wrong_devices_are_refused_before_anything_is_written(server):
    run("add-device", server.root, "a")
    for arguments, words in [
        (("a",), "exists already"),
        (("b", "--client", "0"), "client 0 is device a already"),
        (("../b",), "at most 64 letters"),
        (("b", "--client", "99"), "clients 0 to 23; give the device its own with --data"),
        (("b", "--public-key", server.recipe), "no public key in OpenSSH format"),
    ]:
        assert words in run("add-device", server.root, *arguments, code=2)
    assert [path.name for path in server.devices.iterdir()] == ["a"]
    assert len(load_registry(server.registry).devices) == 1


def test_a_revoked_device_may_come_back_with_a_new_key_only(server):
    run("add-device", server.root, "a")
    old = server.device("a").public_key.read_text()
    assert "its next request will be refused" in run("revoke", server.root, "a")
    assert "did you mean" in run("revoke", server.root, "aa", code=2)
    run("add-device", server.root, "a")
    assert server.device("a").public_key.read_text() != old
    assert [one.revoked for one in load_registry(server.registry).devices] == [True, False]


def test_renewed_certificates_are_new_and_devices_need_no_other_authority(server):
    authority, before = server.ca_certificate.read_bytes(), server.proxy_certificate.read_bytes()
    run("renew", server.root)
    assert server.ca_certificate.read_bytes() == authority
    assert server.proxy_certificate.read_bytes() != before
    now = datetime.datetime.now(datetime.UTC)
    assert days_left(read_certificate(server.proxy_certificate), now) > 700
    server.ca_key.unlink()
    assert "bring it back" in run("renew", server.root, code=2)


def filled(server):
    """Leave what a running server's processes leave, as of now."""
    for name in ("a", "b"):
        run("add-device", server.root, name)
    run("revoke", server.root, "b")
    status = ServerStatus("default-1", 12.0, version=3, received=9, accepted=8, in_flight=1)
    status.rejections = {"not_finite": 1}
    status.loss, status.staleness_mean, status.staleness_max = 1.25, 0.5, 2
    client = status.client(0)
    client.online, client.received, client.refused, client.task_id = True, 9, 1, 17
    client.last_error = "not_finite: layers.0 holds NaN"
    write_json(server.status, status_document(status, time.time()))
    processes = {
        "proxy": {"pid": 1, "restarts": 2, "last_exit": 1, "last_error": "x", "up_s": 5.0},
        "superexec": {
            "pid": None,
            "restarts": 0,
            "last_exit": 3,
            "last_error": "gone",
            "up_s": None,
        },
    }
    write_json(
        server.processes, {"time_s": time.time(), "pid": os.getpid(), "processes": processes}
    )
    write_json(server.state / "proxy.json", {"counts": {"status_200": 5, "refused_revoked": 4}})


def test_status_shows_what_the_processes_left(server):
    assert "server not running; no run has begun" in run("status", server.root)
    filled(server)
    said = run("status", server.root)
    for words in (
        "running", "8 accepted of 9", "0.5 mean, 2 max", "1.250", "online", "revoked", "17",
        "not_finite", "superexec is not running; last words: gone", "4 revoked",
    ):  # fmt: skip
        assert words in said
    found = json.loads(
        CliRunner().invoke(app, ["deploy", "status", str(server.root), "--json"]).output
    )
    assert found["run"]["version"] == 3
    assert [one["state"] for one in found["devices"]] == ["online", "revoked"]


def test_status_of_a_stopped_server_claims_nothing_about_the_present(server):
    filled(server)
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)
    found = server_picture(server, load_server_settings(server.settings), now)
    assert found["running"] is False
    assert found["devices"][0]["state"] == "unknown"


def test_an_old_certificate_is_warned_of(server):
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=720)
    found = server_picture(server, load_server_settings(server.settings), now)
    assert any("certificate proxy ends in" in one for one in found["warnings"])
    assert any("alignfed deploy renew" in one for one in found["warnings"])


def test_prometheus_reads_the_same_figures(server):
    filled(server)
    (port,) = free_ports(1)
    settings = load_server_settings(server.settings).model_copy(update={"metrics_port": port})
    endpoint = Endpoint(server, settings)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        with pytest.raises(DeploymentError, match="change metrics_port"):
            Endpoint(server, settings)
    finally:
        endpoint.close()
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["alignfed_server_version",] == 3
    assert values["alignfed_uploads_accepted_total",] == 8
    assert values["alignfed_device_uploads_refused_total", "a"] == 1
    assert values["alignfed_device_online", "a"] == 1
    assert ("alignfed_device_online", "b") not in values
    assert values["alignfed_process_up", "superexec"] == 0
    assert values["alignfed_process_restarts_total", "proxy"] == 2
    assert values["alignfed_proxy_requests_total", "refused_revoked"] == 4
    assert values["alignfed_certificate_days_left", "proxy"] > 700


def test_logs_are_listed_and_shown_from_their_end(server):
    assert "nothing was started here yet" in run("logs", server.root, code=2)
    (server.logs / "proxy.log").write_text("".join(f"line {n}\n" for n in range(100)))
    assert "proxy" in run("logs", server.root)
    assert run("logs", server.root, "proxy", "-n", "2") == "line 98 line 99"
    assert "did you mean 'proxy'" in run("logs", server.root, "porxy", code=2)


def test_a_devices_status_is_shown_where_it_lives(server):
    run("add-device", server.root, "a")
    device = server.device("a")
    assert "never started" in run("status", device.root)
    device.prepare()
    write_json(device.status, {"state": "ready", "tasks": 4, "model_loads": 1, "last_error": "x"})
    said = run("status", device.root)
    assert "trainer ready: 4 tasks, model loaded 1 times" in said


def test_a_device_writes_its_unit_where_it_lives(server):
    run("add-device", server.root, "a")
    device = server.device("a")
    run("device", device.root, "--unit")
    unit = (device.systemd / "alignfed-device.service").read_text()
    assert f"deploy device {device.root.resolve()}" in unit


@pytest.mark.parametrize("command", ["server", "device", "status", "revoke"])
def test_a_directory_that_is_none_says_which_command_makes_one(tmp_path, command):
    more = ["x"] if command == "revoke" else []
    assert "alignfed deploy" in run(command, tmp_path, *more, code=2)


def test_a_taken_port_is_refused_with_the_setting_to_change(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run("init", tmp_path / "fl", "--host", "localhost", "--port", port)
        assert f":{port} cannot be listened on" in run("server", tmp_path / "fl", code=2)


def test_up_cuts_a_recipe_to_its_devices():
    fitted = recipe_for(default_recipe(), 4)
    assert fitted.data.partition.num_clients == 4
    assert fitted.server.concurrency == 4
    assert recipe_for(default_recipe(["server.concurrency=2"]), 4).server.concurrency == 2


def test_up_cuts_a_recipe_of_one_client_a_file_to_its_devices(tmp_path):
    """Else the simulator's counterpart would have clients that no device stands for."""
    dolly = load_recipe("recipes/dolly.toml", [f"data.path={tmp_path}"])
    assert dolly.data.partition.num_clients is None
    assert recipe_for(dolly, 4).data.partition.num_clients == 4


def test_settings_and_recipe_survive_a_directory_with_odd_letters(tmp_path):
    from alignfed.deploy.settings import ServerSettings, make_settings

    root = tmp_path / 'a b "c" %d'
    settings = make_settings(ServerSettings, "test", {"hosts": ["localhost"]})
    made = create_server(root, settings, default_recipe(), datetime.datetime.now(datetime.UTC))
    assert tomllib.loads(made.settings.read_text())["hosts"] == ["localhost"]
    assert "%%d" in (made.systemd / "alignfed-server.service").read_text()
    assert DeviceDirectory(root).settings.exists() is False
    assert update_registry(made.registry, lambda known: known).devices == ()


def test_without_the_extra_every_command_says_how_to_install_it(tmp_path, monkeypatch):
    from alignfed.cli import refusal

    monkeypatch.setattr(refusal, "_DEPLOY_EXTRA", ("flwr", "no_such_package"))
    said = run("init", tmp_path / "fl", "--host", "localhost", code=2)
    assert "no_such_package not installed" in said
    assert "pip install 'alignfed[deploy]'" in said
    result = CliRunner().invoke(app, ["up", "--out", str(tmp_path / "up")])
    assert result.exit_code == 2
    assert "alignfed[deploy]" in result.output

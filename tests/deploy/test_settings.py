"""Settings of servers and devices: what they refuse, in which words, and that they read back."""

import pytest

from alignfed.deploy.directory import SOCKET_PATH_BYTES, DeviceDirectory, ServerDirectory
from alignfed.deploy.settings import (
    DeviceSettings,
    ServerSettings,
    load_device_settings,
    load_server_settings,
    make_settings,
    settings_text,
)
from alignfed.errors import DeploymentError

SERVER = {"hosts": ["fl.example.org"]}
DEVICE = {"name": "phone-1", "client": 3, "server": "fl.example.org:9443"}

WRONG_SERVERS = {
    "prot": ({"prot": 1}, ("prot", "did you mean 'port'?")),
    "limits": ({"limits": {"body_byts": 1}}, ("did you mean 'limits.body_bytes'?",)),
    "elsewhere": ({"body_bytes": 1}, ("did you mean 'limits.body_bytes'?",)),
    "range": ({"port": 70000}, ("port = 70000", "a whole number from 1 to 65535")),
    "type": ({"port": "9443"}, ('port = "9443"', "a whole number")),
    "hosts": ({"hosts": []}, ("hosts", "a list of at least 1 host name")),
    "scheme": ({"hosts": ["https://a"]}, ("leave out port and scheme",)),
    "same port": ({"superlink_port": 9443}, ("superlink_port", "9443 is port too")),
    "encoding": ({"serving": {"encoding": "bf61"}}, ("did you mean 'bf16'?",)),
}


@pytest.mark.parametrize("case", WRONG_SERVERS)
def test_wrong_server_settings_are_refused_with_value_limit_and_remedy(case):
    change, words = WRONG_SERVERS[case]
    with pytest.raises(DeploymentError) as refused:
        make_settings(ServerSettings, "deploy.toml", {**SERVER, **change})
    for word in words:
        assert word in str(refused.value)


def test_all_problems_are_listed_at_once():
    with pytest.raises(DeploymentError, match="2 problems") as refused:
        make_settings(DeviceSettings, "device.toml", {**DEVICE, "client": -1, "server": "nowhere"})
    assert "host:port" in str(refused.value)
    assert "client = -1" in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "values", "load"),
    [
        (ServerSettings, SERVER, load_server_settings),
        (DeviceSettings, {**DEVICE, "data": "my.jsonl"}, load_device_settings),
    ],
)
def test_commented_settings_read_back_the_same(kind, values, load, tmp_path):
    settings = make_settings(kind, "here", values)
    path = tmp_path / "settings.toml"
    path.write_text(settings_text(settings))
    assert load(path) == settings


def test_a_missing_settings_file_says_which_command_makes_it(tmp_path):
    with pytest.raises(DeploymentError, match="alignfed deploy init"):
        load_server_settings(tmp_path / "deploy.toml")
    with pytest.raises(DeploymentError, match="alignfed deploy add-device"):
        load_device_settings(tmp_path / "device.toml")


def test_folders_with_secrets_are_closed_to_others(tmp_path):
    server = ServerDirectory(tmp_path / "server")
    server.prepare()
    for folder in (server.devices, server.state, server.proxy_key.parent, server.ca_key.parent):
        assert folder.stat().st_mode & 0o077 == 0


def test_the_trainers_socket_has_a_path_that_fits_however_deep_the_device_lies(tmp_path):
    deep = DeviceDirectory(tmp_path / ("deep" * 20) / "device")
    shallow = DeviceDirectory(tmp_path)
    assert len(str(deep.trainer_socket)) <= SOCKET_PATH_BYTES
    assert deep.trainer_socket != DeviceDirectory(deep.root.parent / "other").trainer_socket
    deep.prepare()
    assert deep.trainer_socket.parent.stat().st_mode & 0o077 == 0
    assert shallow.trainer_socket.name == "trainer.sock"
    deep.trainer_socket.touch()
    deep.forget_socket()
    assert not deep.trainer_socket.parent.exists()
    deep.forget_socket()  # as often as one likes


def test_forgetting_a_socket_leaves_the_devices_own_folders(tmp_path_factory):
    device = DeviceDirectory(tmp_path_factory.mktemp("d"))
    device.prepare()
    assert device.trainer_socket.parent == device.state.resolve()
    device.trainer_socket.touch()
    device.forget_socket()
    assert list(device.state.iterdir()) == [device.flower_home]


def test_a_socket_folder_open_to_others_is_refused(tmp_path):
    device = DeviceDirectory(tmp_path / ("deep" * 20))
    folder = device.trainer_socket.parent
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    try:
        with pytest.raises(DeploymentError, match="mode 755"):
            device.prepare()
    finally:
        folder.rmdir()

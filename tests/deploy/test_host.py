"""`alignfed deploy device`: three real processes, while the server cannot be reached."""

from __future__ import annotations

import datetime
import signal
import subprocess
import sys

import pytest

from alignfed.deploy.creating import add_device, create_server
from alignfed.deploy.settings import ServerSettings, make_settings
from tests.deploy.devices import small_recipe, wait_until


@pytest.mark.slow
def test_a_device_that_is_stopped_leaves_neither_socket_nor_socket_folder(tmp_path):
    settings = make_settings(
        ServerSettings, "the test", {"hosts": ["localhost"], "port": 1, "metrics_port": 0}
    )
    now = datetime.datetime.now(datetime.UTC)
    server = create_server(tmp_path / ("deep" * 20), settings, small_recipe(), now)
    device = add_device(server, settings, "d0")
    socket = device.trainer_socket
    assert socket.parent != device.state.resolve()
    command = [sys.executable, "-m", "alignfed", "deploy", "device", str(device.root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: process.poll() is not None or socket.exists(), 180)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "finished work is kept" in said
    assert not socket.parent.exists()

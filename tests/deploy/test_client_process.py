"""The client process beside a real SuperNode: it answers, comes back, and runs nobody's code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from alignfed.deploy.device import training_digest
from alignfed.deploy.pki import make_secret, write_secret
from alignfed.deploy.trainer_process import read_status
from alignfed.flower.outbox import Outbox
from alignfed.flower.wire import Download, encode_download
from tests.deploy.devices import (
    initial_adapter,
    make_device,
    small_recipe,
    trainer_process,
    wait_until,
)

BIN = Path(sys.executable).parent
TASKS, LONG = 4, 2
"""How many tasks there are, and which of them is long enough to be hit."""

PROJECT = """
[project]
name = "tasks"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "alignfed"
[tool.flwr.app.components]
serverapp = "server:app"
clientapp = "client:app"
[tool.flwr.app.config]
folder = ""
digest = ""
"""

# Whoever imports this runs code that a server sent.
CLIENT = """
from pathlib import Path
from flwr.clientapp import ClientApp
Path({marker!r}).touch()
app = ClientApp()
"""

# Sends a task, waits for its upload, and acknowledges it with the next but one.
SERVER = """
import time
from pathlib import Path
from flwr.app import Message
from flwr.serverapp import ServerApp
from alignfed.flower.messages import TaskOrder, read_reply, write_order

app = ServerApp()

@app.main()
def main(grid, context):
    folder, digest = Path(context.run_config["folder"]), context.run_config["digest"]
    payload = (folder / "payload").read_bytes()
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    for task_id in range({tasks}):
        order = TaskOrder("run-1", digest, task_id, 0, task_id, payload,
                          steps={steps} if task_id == {long} else None,
                          acknowledged=tuple(range(task_id - 1)))
        message = Message(write_order(order), dst_node_id=nodes[0], message_type="train")
        ids = list(grid.push_messages([message]))
        while not (replies := list(grid.pull_messages(ids))):
            time.sleep(0.1)
        if replies[0].has_error():
            (folder / "error").write_text(str(replies[0].error))
            return
        found = read_reply(replies[0].content)
        (folder / ("reply-%d" % task_id)).write_text(" ".join(map(str, found.payloads)))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(root: Path, name: str, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {
        **os.environ,
        "FLWR_HOME": str(root / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    with (root / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
                process.wait(5)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait()


@pytest.mark.slow
def test_a_client_process_answers_even_when_it_is_killed_mid_task_and_runs_no_code_it_is_sent(
    tmp_path,
):
    recipe, marker = small_recipe(), tmp_path / "imported-on-the-device"
    server_port, node_port = free_port(), free_port()
    directory = make_device(tmp_path / "device", recipe, runtime_port=node_port)
    write_secret(directory.runtime_secret, make_secret())
    app = tmp_path / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "client.py").write_text(CLIENT.format(marker=str(marker)))
    (app / "server.py").write_text(SERVER.format(tasks=TASKS, long=LONG, steps=300))
    download = Download("run-1", 0, initial_adapter(recipe))
    (tmp_path / "payload").write_bytes(encode_download(download, "fp32"))
    (tmp_path / "flower").mkdir()
    (tmp_path / "flower" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{server_port}"\n'
        "insecure = true\n"
    )
    superlink = (str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1",
                 "--port", str(server_port))  # fmt: skip
    supernode = (str(BIN / "flower-supernode"), "--insecure", "--host", "127.0.0.1",
                 "--superlink", f"127.0.0.1:{server_port}", "--port", str(node_port),
                 "--isolation", "process",
                 "--superexec-auth-secret-file", str(directory.runtime_secret))  # fmt: skip
    client = (sys.executable, "-m", "alignfed.deploy.client_process", str(directory.root))
    run = (str(BIN / "flwr"), "run", str(app), "here", "--stream", "--run-config",
           f'folder="{tmp_path}" digest="{training_digest(recipe)}"')  # fmt: skip

    def replied(task_id: int) -> bool:
        assert not (tmp_path / "error").exists(), (tmp_path / "error").read_text()
        return (tmp_path / f"reply-{task_id}").exists()

    with running(tmp_path, "superlink", *superlink):
        wait_until(lambda: listening(server_port))
        with (
            running(tmp_path, "supernode", *supernode),
            trainer_process(directory),
            running(tmp_path, "client", *client) as first,
            running(tmp_path, "run", *run) as flower_run,
        ):
            wait_until(lambda: replied(LONG - 1), 240)
            wait_until(lambda: read_status(directory.status).state == "training", 60)
            first.kill()
            first.wait()
            with running(tmp_path, "client", *client):
                wait_until(lambda: replied(TASKS - 1), 240)
                flower_run.wait(60)
    replies = [(tmp_path / f"reply-{i}").read_text() for i in range(TASKS)]
    assert replies == ["0", "0 1", "1 2", "2 3"]
    status = read_status(directory.status)
    assert (status.model_loads, status.tasks) == (1, TASKS)
    assert "killed over" in (tmp_path / "client.log").read_text()
    outbox = Outbox(directory.outbox / "outbox.sqlite")
    assert [one.task_id for one in outbox.waiting("run-1")] == [2, 3]
    outbox.close()
    assert not marker.exists()


@pytest.mark.slow
def test_without_the_secret_nobody_takes_a_device_s_tasks(tmp_path):
    import httpx
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    port = free_port()
    secret = tmp_path / "secret"
    write_secret(secret, make_secret())
    supernode = (str(BIN / "flower-supernode"), "--insecure", "--host", "127.0.0.1",
                 "--superlink", f"127.0.0.1:{free_port()}", "--port", str(port),
                 "--isolation", "process", "--superexec-auth-secret-file", str(secret))  # fmt: skip
    with running(tmp_path, "supernode", *supernode):
        wait_until(lambda: listening(port))
        client = RuntimeHttpClient.from_server_address(
            server_address=f"127.0.0.1:{port}",
            insecure=True,
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")],
        )
        with pytest.raises(httpx.HTTPStatusError) as caught:
            client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        client.close()
    assert caught.value.response.status_code in (401, 403)

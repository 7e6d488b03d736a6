"""How long a device waits between two tasks, beside bare Flower with a warm executor.

    python benchmarks/turnaround.py --tasks 12 --repeat 2

Real SuperLink, SuperNode and ServerApp processes on loopback, one side after the other, as often as
asked; every server looks for replies every 0.2 s and sends the next task at once. What is timed is
the device's idle time: from the end of one task to the start of the next.

    echo      Flower's echo app in a process that stays (the target is 1.3 times this)
    alignfed  our server, client process and warm trainer: the built-in model, its adapter both ways
    cold      the same behind a ClientApp that Flower starts afresh for every message

Flower's own pauses are most of it: a SuperNode without a message sleeps 3 s.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from alignfed.build import model_settings
from alignfed.config import default_recipe
from alignfed.deploy.directory import DeviceDirectory
from alignfed.deploy.pki import make_secret, write_secret
from alignfed.deploy.settings import DeviceSettings, settings_text
from alignfed.flower.wire import Download, encode_download
from alignfed.trainers import lora_settings
from alignfed.training.loading import load_base

HERE = Path(__file__).resolve()
TARGET = 1.3
BIN = Path(sys.executable).parent
POLL_S = 0.2
"""Both servers look for replies so often."""

PROJECT = """
[project]
name = "turnaround"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "alignfed"
[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "client:app"
[tool.flwr.app.config]
folder = ""
tasks = 0
"""

# The bare server keeps one task in flight and sends the next as soon as it has seen the reply. The
# other is the real one: coordinator, journal, a flush after every upload, evaluation at the ends.
ECHO_SERVER = """
import time
from pathlib import Path
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

server = ServerApp()

@server.main()
def main(grid, context):
    folder, tasks = Path(context.run_config["folder"]), int(context.run_config["tasks"])
    payload = (folder / "payload").read_bytes()
    while not (nodes := list(grid.get_node_ids())):
        time.sleep({poll_s})
    for _ in range(tasks):
        array = Array("uint8", (len(payload),), "bytes", payload)
        content = RecordDict({{"adapter": ArrayRecord({{"payload": array}})}})
        sent = Message(content, dst_node_id=nodes[0], message_type="train")
        ids = list(grid.push_messages([sent]))
        while not (replies := list(grid.pull_messages(ids))):
            time.sleep({poll_s})
        if replies[0].has_error():
            raise RuntimeError(str(replies[0].error))
    (folder / "done").touch()
"""

# A file of its own: a fresh process for every message must not import what the server needs.
CLIENT = """
from alignfed.deploy import client_app
app = client_app.app
"""

SERVER = """
from pathlib import Path
from flwr.serverapp import ServerApp
from alignfed.config import load_recipe
from alignfed.deploy.serve import Server, serve
from alignfed.flower.driver import DriverSettings
from alignfed.flower.members import FirstComeMembers
from alignfed.journal import RunDirectory

server = ServerApp()

@server.main()
def main(grid, context):
    folder = Path(context.run_config["folder"])
    serve(grid, Server(
        recipe=load_recipe(folder / "recipe.toml"), place=RunDirectory(folder / "run"),
        members=FirstComeMembers(), client_ids=lambda: [0], encoding="bf16",
        settings=DriverSettings(poll_s={poll_s}),
    ))
    (folder / "done").touch()
"""


def echo_process(port: int, log: Path) -> None:
    """Serve Flower's echo app in this process, and note when each task starts and ends."""
    from flwr.app import Context, Message

    from alignfed.flower.warm_client import WarmClient

    def echo(message: Message, context: Context) -> Message:
        with log.open("a") as file:
            print("begins", time.time(), file=file)
            reply = Message(message.content, reply_to=message)
            print("finished", time.time(), file=file)
        return reply

    WarmClient(f"127.0.0.1:{port}", echo).serve()


def measure(side: str, tasks: int, root: Path) -> list[float]:
    """Return the idle seconds between the tasks of one run of one side."""
    root.mkdir()
    environment = {
        **os.environ,
        "FLWR_HOME": str(root / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    server_port, node_port = free_port(), free_port()
    recipe = default_recipe([
        "training.steps=1", "training.batch_size=4", "data.num_examples=120",
        "data.evaluation_examples=16", "data.partition.num_clients=1", "server.concurrency=1",
        "server.buffer_size=1", "evaluation.every_versions=1000", f"stop.uploads={tasks}",
    ])  # fmt: skip
    (root / "recipe.toml").write_text(recipe.to_toml())
    adapter = load_base(model_settings(recipe, ()), lora_settings(recipe), 0).initial_adapter()
    (root / "payload").write_bytes(encode_download(Download("echo", 0, adapter), "bf16"))
    app = root / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    text = ECHO_SERVER if side == "echo" else SERVER
    (app / "app.py").write_text(text.format(poll_s=POLL_S))
    (app / "client.py").write_text(CLIENT)
    (root / "flower").mkdir()
    (root / "flower" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{server_port}"\n'
        "insecure = true\n"
    )
    log = root / "device.log"

    with ExitStack() as stack:

        def start(name: str, *command: str) -> subprocess.Popen[bytes]:
            return stack.enter_context(running(command, environment, root / f"{name}.log"))

        flower = (str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1",
                  "--disable-runtime-dependency-installation")  # fmt: skip
        start("superlink", *flower, "--port", str(server_port))
        wait(lambda: listening(server_port), "the SuperLink")
        node = [
            str(BIN / "flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{server_port}",
            "--host", "127.0.0.1", "--port", str(node_port),
        ]  # fmt: skip
        if side == "echo":
            start("supernode", *node, "--isolation", "process")
            start("client", sys.executable, str(HERE), "--echo", str(node_port), str(log))
        else:
            directory = make_device(root / "device", recipe.to_toml(), node_port)
            start("device", sys.executable, "-m", "alignfed.deploy.trainer_process",
                  str(directory.root))  # fmt: skip
            wait(directory.trainer_socket.exists, "the trainer", 300)
            if side == "cold":
                config = f'alignfed-directory="{directory.root}"'
                start("supernode", *node, "--node-config", config)
            else:
                write_secret(directory.runtime_secret, make_secret())
                secret = str(directory.runtime_secret)
                start("supernode", *node, "--isolation", "process",
                      "--superexec-auth-secret-file", secret)  # fmt: skip
                start("client", sys.executable, "-m", "alignfed.deploy.client_process",
                      str(directory.root))  # fmt: skip
        wait(lambda: listening(node_port), "the SuperNode")
        run = start("run", str(BIN / "flwr"), "run", str(app), "here", "--stream", "--run-config",
              f'folder="{root}" tasks={tasks}')  # fmt: skip
        wait(lambda: run.poll() is not None, f"{tasks} tasks", 60 + 30 * tasks)
    if not (root / "done").exists():
        raise SystemExit((root / "run.log").read_text())
    begins, ends = read_times(log)
    # A device may begin one more task than the run had use for.
    begins, ends = begins[:tasks], ends[:tasks]
    assert len(begins) == len(ends) == tasks, f"{log} has {len(begins)} starts, {len(ends)} ends"
    return [start - end for end, start in zip(ends, begins[1:], strict=False)]


def make_device(root: Path, recipe: str, port: int) -> DeviceDirectory:
    """Write the directory of a device."""
    directory = DeviceDirectory(root)
    directory.prepare()
    directory.recipe.write_text(recipe)
    settings = DeviceSettings(name="device", client=0, server="127.0.0.1:1", runtime_port=port)
    directory.settings.write_text(settings_text(settings))
    return directory


def read_times(log: Path) -> tuple[list[float], list[float]]:
    """Return when tasks began and when they were finished, from either kind of log."""
    begins, ends = [], []
    for line in log.read_text().splitlines():
        if found := re.match(r"(\S+ \S+) INFO task \d+ (begins|is finished)", line):
            at_s = datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
        elif found := re.match(r"(begins|finished) (\S+)$", line):
            at_s = float(found[2])
        else:
            continue
        (begins if "begins" in line else ends).append(at_s)
    return begins, ends


@contextmanager
def running(
    command: tuple[str, ...], environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own, and end the group whatever happens."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        for sign, limit_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(process.pid, sign)
                process.wait(limit_s)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue


def wait(true: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
    until_s = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > until_s:
            raise SystemExit(f"{what} did not come within {limit_s:g} s")
        time.sleep(0.05)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--sides", default="echo,alignfed,cold")
    parser.add_argument("--keep", action="store_true", help="leave the logs where they are")
    parser.add_argument("--echo", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.echo:
        echo_process(int(given.echo[0]), Path(given.echo[1]))
    sides = given.sides.split(",")
    idle: dict[str, list[float]] = {side: [] for side in sides}
    root = Path(tempfile.mkdtemp(prefix="turnaround-"))
    try:
        for turn in range(given.repeat):
            for side in sides:
                found = measure(side, given.tasks, root / f"{side}-{turn}")
                idle[side] += found
                print(f"{side:9} {turn + 1}: median {statistics.median(found):.2f} s", flush=True)
    finally:
        if given.keep:
            print(f"logs are in {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    print(f"\n{'side':9} {'tasks':>5} {'mean':>7} {'median':>7} {'worst':>7}   against echo")
    for side in sides:
        mean = statistics.mean(idle[side])
        ratio = mean / statistics.mean(idle["echo"]) if "echo" in idle else float("nan")
        print(
            f"{side:9} {len(idle[side]):5} {mean:7.2f} {statistics.median(idle[side]):7.2f}"
            f" {max(idle[side]):7.2f}   {ratio:.2f}"
            + (f" (target {TARGET})" if side == "alignfed" else "")
        )


if __name__ == "__main__":
    main()

"""Device directories for tests, and what a server would send them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignfed.build import model_settings
from alignfed.config import Recipe, default_recipe
from alignfed.core.adapter import Adapter
from alignfed.deploy.directory import DeviceDirectory
from alignfed.deploy.settings import DeviceSettings, settings_text
from alignfed.flower.messages import TaskOrder
from alignfed.flower.wire import Download, download_encoding, encode_download
from alignfed.trainers import lora_settings
from alignfed.training.loading import load_base

SMALL = (
    "data.num_examples=120",
    "data.evaluation_examples=16",
    "data.calibration_examples=4",
    "data.partition.num_clients=3",
    "data.partition.min_size=8",
    "training.steps=2",
    "training.batch_size=4",
    "lora.rank=2",
    "server.concurrency=2",
    "server.buffer_size=2",
)


def small_recipe(*overrides: str) -> Recipe:
    """Return the built-in recipe, small enough to train in a moment."""
    return default_recipe([*SMALL, "training.cohort_size=1", *overrides])


def initial_adapter(recipe: Recipe) -> Adapter:
    """Return the adapter that a federation of the recipe begins with."""
    return load_base(
        model_settings(recipe, ()), lora_settings(recipe), recipe.seed
    ).initial_adapter()


def make_device(root: Path, recipe: Recipe, client: int = 0, **settings: object) -> DeviceDirectory:
    """Write a device's directory, keys aside."""
    directory = DeviceDirectory(root)
    directory.prepare()
    directory.recipe.write_text(recipe.to_toml())
    values = {"name": f"device-{client}", "client": client, "server": "localhost:1", **settings}
    directory.settings.write_text(settings_text(DeviceSettings.model_validate(values)))
    return directory


def order_for(adapter: Adapter, digest: str, task_id: int = 0, **changes: object) -> TaskOrder:
    """Return the order that sends ``adapter`` to a device."""
    values = {"run": "run-1", "base_version": 0, "dispatch": 0, "encoding": "fp32", **changes}
    down = download_encoding(values["encoding"])
    payload = encode_download(Download(values["run"], values["base_version"], adapter), down)
    return TaskOrder(training_digest=digest, task_id=task_id, payload=payload, **values)


@contextmanager
def trainer_process(directory: DeviceDirectory) -> Iterator[subprocess.Popen[bytes]]:
    """Run a device's trainer; its log goes into the device's folder of logs."""
    anothers = directory.trainer_socket.exists()
    with (directory.logs / "trainer.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "alignfed.deploy.trainer_process", str(directory.root)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if not anothers:
            directory.forget_socket()


def wait_until(true: object, limit_s: float = 60.0) -> None:
    """Wait for something to become true, or fail."""
    until_s = time.monotonic() + limit_s
    while not true():  # type: ignore[operator]
        assert time.monotonic() < until_s, f"not within {limit_s} s"
        time.sleep(0.02)

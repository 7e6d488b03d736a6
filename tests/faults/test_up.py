"""`alignfed up` as a user runs it: real processes, and the files of a simulated run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from alignfed.api import simulate
from alignfed.config import load_recipe
from alignfed.deploy.directory import DeviceDirectory
from alignfed.deploy.session import MARK
from alignfed.journal import RunReader
from tests.deploy.same_order import loss_in_the_same_order
from tests.faults.federation import EVERYTHING, small_recipe, until
from tests.shared import shared

pytestmark = pytest.mark.slow

DEVICES = 2
CLOSE = 0.03
"""Largest relative difference of losses."""


def begin(
    folder: Path, recipe: Path, overrides: Sequence[str] = (), devices: int = DEVICES
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "alignfed", "up", str(recipe), "--devices", str(devices)]
    settings = [word for one in overrides for word in ("--set", one)]
    return subprocess.Popen(
        [*command, *settings, "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_behind(folder: Path) -> list[str]:
    """Return the commands of processes that belong to a federation's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(folder) in command and MARK.encode() in environment:
                found.append(command)
    return found


def write_recipe(path: Path, *overrides: str) -> Path:
    """Write a recipe with steps small enough that last bits are not blown up into per cents."""
    path.write_text(
        small_recipe(
            DEVICES, "training.steps=8", "training.learning_rate=5e-4", *overrides
        ).to_toml()
    )
    return path


def test_up_leaves_a_simulated_runs_files_and_its_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = begin(folder, write_recipe(tmp_path / "recipe.toml", "stop.uploads=16"))
    said, complaints = process.communicate(timeout=600)
    assert process.returncode == 0, complaints
    assert left_behind(folder) == []
    sockets = [DeviceDirectory(one).trainer_socket for one in folder.glob("deployment/devices/*")]
    assert len(sockets) == DEVICES
    assert not any("alignfed-" in one.parent.name and one.parent.exists() for one in sockets)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["uploads"] == 16
    assert summary["model_loads"] == {"device-0": 1, "device-1": 1}
    assert "model loads: device-0 1, device-1 1" in said
    for name in ("adapter", "journal.sqlite", "metrics.jsonl", "recipe.toml"):
        assert (folder / name).exists()
    same = loss_in_the_same_order(folder)
    assert summary["final_eval_loss"] == pytest.approx(same, rel=CLOSE)


def test_an_interrupted_federation_goes_on_and_ends_where_the_simulator_does(
    tmp_path: Path,
) -> None:
    """FedAvg waits for everybody, so the order in which uploads come cannot matter."""
    folder = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.toml", "stop.uploads=16", "strategy.rule=fedavg")
    process = begin(folder, recipe)
    try:
        until(lambda: process.poll() is not None or _received(folder) >= 4, 300)
        process.send_signal(signal.SIGINT)
        said, complaints = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, complaints
    assert "no process is left" in complaints
    until(lambda: left_behind(folder) == [], 5)
    process = begin(folder, recipe)
    said, complaints = process.communicate(timeout=600)
    assert process.returncode == 0, complaints
    assert "resuming" in said
    assert left_behind(folder) == []
    summary = json.loads((folder / "summary.json").read_text())
    simulated = simulate(load_recipe(folder / "recipe.toml"), tmp_path / "simulated").summary
    assert summary["uploads"] == simulated["uploads"] == 16
    assert summary["final_eval_loss"] == pytest.approx(simulated["final_eval_loss"], rel=CLOSE)


@pytest.mark.skipif(not EVERYTHING, reason="ALIGNFED_FAULTS=all runs it, as make faults does")
def test_four_devices_on_real_text_end_where_the_simulator_does_with_equal_devices(
    tmp_path: Path,
) -> None:
    """The default rule, in whichever order uploads come: docs/deploy.md has longer runs.

    Steps by speed would follow how busy this machine is.
    """
    folder = tmp_path / "run"
    overrides = [
        f"model.path={shared('models', 'stories260K')}",
        f"data.path={shared('data', 'dolly15k_10clients')}",
        "strategy.local_steps=equal",
        "stop.uploads=18",
    ]
    process = begin(folder, Path("recipes/dolly.toml"), overrides, devices=4)
    _, complaints = process.communicate(timeout=1200)
    assert process.returncode == 0, complaints
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["model_loads"] == {f"device-{number}": 1 for number in range(4)}
    simulated = simulate(
        folder / "recipe.toml", tmp_path / "simulated", overrides=["fleet.preset=equal"]
    ).summary
    assert summary["uploads"] == simulated["uploads"] == 18
    assert summary["clients"] == simulated["clients"] == 4
    assert simulated["final_eval_loss"] < 0.85 * simulated["base_eval_loss"]
    assert summary["base_eval_loss"] == pytest.approx(simulated["base_eval_loss"], rel=1e-6)
    assert summary["final_eval_loss"] == pytest.approx(simulated["final_eval_loss"], rel=CLOSE)


def _received(folder: Path) -> int:
    if not (folder / "journal.sqlite").exists():
        return 0
    with RunReader(folder) as reader:
        return sum(reader.outcomes().values())


def test_a_killed_command_leaves_no_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = begin(folder, write_recipe(tmp_path / "recipe.toml", "stop.uploads=16"))
    until(lambda: process.poll() is not None or len(left_behind(folder)) >= 4, 120)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(1.0)
    until(lambda: left_behind(folder) == [], 30)

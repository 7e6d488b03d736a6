"""A served run: begun, killed, gone on with, finished, and left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignfed.deploy import serve as serve_module
from alignfed.deploy.serve import Server, run_name, serve
from alignfed.errors import JournalError
from alignfed.flower.driver import DriverSettings
from alignfed.flower.status import ServerStatus
from alignfed.journal import RunDirectory, RunReader
from tests.deploy.devices import small_recipe
from tests.flower.grids import Clock, Everybody, FakeDevice, ScriptedGrid

RECIPE = small_recipe("stop.uploads=8", "evaluation.every_versions=2")


class KilledError(Exception):
    """The process ends here."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(serve_module.time, "monotonic", clock)
    monkeypatch.setattr(serve_module.time, "sleep", clock.sleep)
    return clock


def server(root: Path, report: Callable[[ServerStatus], None] = lambda status: None) -> Server:
    return Server(
        recipe=RECIPE,
        place=RunDirectory(root),
        members=Everybody(),
        client_ids=lambda: [0, 1, 2],
        settings=DriverSettings(start_clients=3, checkpoint_s=4.0),
        encoding="bf16",
        report=report,
    )


def devices() -> dict[int, FakeDevice]:
    return {100 + i: FakeDevice(takes_s=3.0 + i, shift=1e-3) for i in range(3)}


def test_a_served_run_leaves_what_a_simulated_one_leaves(tmp_path: Path, clock: Clock) -> None:
    seen: list[ServerStatus] = []
    summary = serve(ScriptedGrid(clock, devices()), server(tmp_path, seen.append))
    assert summary["uploads"] == 8 and summary["stop_reason"] == "max_uploads"
    assert summary["base_eval_loss"] > 0 and summary["client_loss_mean"] > 0
    assert summary["downloaded_bytes"] > 0 and summary["uploaded_bytes"] > 0
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    for name in ("recipe.toml", "journal.sqlite", "metrics.jsonl", "adapter"):
        assert (tmp_path / name).exists()
    assert seen[-1].stopped == "max_uploads" and set(seen[-1].clients) == {0, 1, 2}
    # Served again, it is left as it is, and no device is written to.
    grid = ScriptedGrid(clock, devices())
    assert serve(grid, server(tmp_path)) == summary
    assert grid.pushed == []


def test_a_killed_server_goes_on_in_a_new_flower_run(tmp_path: Path, clock: Clock) -> None:
    theirs = devices()

    def die_at(uploads: int) -> Callable[[ServerStatus], None]:
        def die(status: ServerStatus) -> None:
            if status.received >= uploads and status.stopped is None:
                raise KilledError

        return die

    for uploads in (3, 6):
        with pytest.raises(KilledError):
            serve(ScriptedGrid(clock, theirs), server(tmp_path, die_at(uploads)))
    name = run_name(RunDirectory(tmp_path))
    summary = serve(ScriptedGrid(clock, theirs), server(tmp_path))
    assert summary["uploads"] == 8 and run_name(RunDirectory(tmp_path)) == name
    with RunReader(tmp_path) as reader:
        tasks = [upload.task_id for upload in reader.uploads()]
    assert len(tasks) == len(set(tasks))
    finished = {task for device in theirs.values() for task in device.trained}
    assert finished == set(tasks)


def test_another_recipe_is_refused(tmp_path: Path, clock: Clock) -> None:
    def die(status: ServerStatus) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        serve(ScriptedGrid(clock, devices()), server(tmp_path, die))
    other = server(tmp_path)
    object.__setattr__(other, "recipe", small_recipe("stop.uploads=9"))
    with pytest.raises(JournalError, match="another recipe"):
        serve(ScriptedGrid(clock, devices()), other)


def test_a_run_without_its_name_is_refused(tmp_path: Path, clock: Clock) -> None:
    def die(status: ServerStatus) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        serve(ScriptedGrid(clock, devices()), server(tmp_path, die))
    (tmp_path / "deployment.json").unlink()
    with pytest.raises(JournalError, match=r"deployment\.json is missing"):
        serve(ScriptedGrid(clock, devices()), server(tmp_path))

"""Devices cut off for a while or for most of a run: what they finished is not lost silently."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from alignfed.journal import RunReader
from tests.faults.federation import Cable, Federation, small_recipe, until
from tests.faults.records import check_record

pytestmark = pytest.mark.slow

CUT_S = 30.0


def complete(federation: Federation) -> dict:
    until(lambda: federation.failure or federation.host.completed, 400)
    assert federation.failure is None
    return check_record(federation.run, federation.finished_tasks())


def cut_in_a_task(federation: Federation, number: int, cable: Cable) -> int:
    """Cut a device's line in the middle of a task; return the task once it is finished."""
    known = federation.finished_tasks(number)
    until(lambda: federation.trainer(number).get("state") == "training", 120, 0.01)
    cable.cut()
    until(lambda: federation.finished_tasks(number) > known, 120)
    return max(federation.finished_tasks(number) - known)


def test_a_cut_of_thirty_seconds_and_a_long_absence_lose_no_finished_work(tmp_path: Path) -> None:
    recipe = small_recipe(3, "stop.uploads=40")
    with Federation(tmp_path / "server", 3, recipe) as federation:
        short, long = Cable(federation.settings.port), Cable(federation.settings.port)
        federation.start_device(0)
        federation.start_device(1, short.address)
        federation.start_device(2, long.address)
        until(lambda: federation.status()["received"] >= 3, 240)
        stale = cut_in_a_task(federation, 2, long)
        version = federation.status()["version"]
        began_s = time.monotonic()
        held = cut_in_a_task(federation, 1, short)
        time.sleep(max(0.0, CUT_S - (time.monotonic() - began_s)))
        short.mend()
        until(lambda: federation.status()["version"] >= version + 5, 240)
        long.mend()
        complete(federation)
        short.close()
        long.close()
        with RunReader(federation.run) as reader:
            uploads = {one.task_id: one for one in reader.uploads()}
    assert uploads[held].outcome == "applied" or uploads[held].reason
    late = uploads[stale]
    assert (late.outcome == "rejected" and late.reason) or (late.staleness or 0) >= 3
    assert {one.client_id for one in uploads.values() if one.outcome == "applied"} == {0, 1, 2}

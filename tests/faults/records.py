"""What a run's record must show whatever happened to its processes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from alignfed.journal import RunReader


def check_record(run: Path, finished: set[int]) -> dict:
    """Return the summary of a run after checking its record.

    Args:
        run: the run's directory.
        finished: tasks that were finished on devices.
    """
    summary = json.loads((run / "summary.json").read_text())
    with RunReader(run) as reader:
        uploads = list(reader.uploads())
        published = [row for row in reader.rows(name="Publish")]
        failed = {row.task_id: row.body["reason"] for row in reader.rows(name="TaskFailed")}
    fates = Counter((one.task_id, one.outcome) for one in uploads)
    assert all(number == 1 for (_, outcome), number in fates.items() if outcome == "applied")
    applied = [task for row in published for task in _applied(row.body)]
    assert len(applied) == len(set(applied)), "a flush took an upload a second time"
    assert set(applied) == {task for task, outcome in fates if outcome == "applied"}
    assert all(one.reason for one in uploads if one.outcome == "rejected")
    buffered = {one.task_id for one in uploads if one.outcome == "buffered"}
    given_up = {task for task, reason in failed.items() if "had been away" in reason}
    lost = finished - {one.task_id for one in uploads} - given_up
    assert lost == set(), f"finished on a device, unknown to the server: {lost}"
    assert len(buffered) < 2, "at most what did not fill the last buffer"
    assert summary["uploads"] == len(applied)
    return summary


def _applied(body: dict) -> list[int]:
    # Journalled as a row: task, client, base version, staleness, weight, norm.
    return [row[0] for row in body["applied"]]

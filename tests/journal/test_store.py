"""The journal writes whole events, in order, and the same rows for the same run."""

from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from alignfed.core.adapter import Adapter
from alignfed.core.events import (
    ClientJoined,
    EvaluationFinished,
    RunStarted,
    TaskFailed,
    UpdateArrived,
)
from alignfed.core.instructions import AppliedUpload, Publish, Reject, RejectReason
from alignfed.core.update import Update
from alignfed.errors import JournalError
from alignfed.journal import Batching, RunReader, SqliteJournal
from tests.core.adapters import make_adapter
from tests.journal import scripted


class Surprise:
    """An event the journal does not know."""

    time_s = 0.0


def committed(root: Path) -> int:
    connection = sqlite3.connect(root / "journal.sqlite")
    try:
        return int(connection.execute("SELECT COUNT(*) FROM rows").fetchone()[0])
    finally:
        connection.close()


def arrived(task_id: Any, client_id: Any = 1, **changes: Any) -> UpdateArrived:
    values = {"base_version": 0, "adapter": make_adapter(), "num_examples": 4} | changes
    return UpdateArrived(1.0, Update(task_id, client_id, **values))


def run(root: Path, steps: int, **options: Any) -> SqliteJournal:
    journal, _ = scripted.create(root, **options)
    state = scripted.beginning()
    for _ in range(steps):
        scripted.step(state, journal)
    return journal


def test_the_same_run_gives_the_same_rows_whatever_the_clock_and_the_batches(
    tmp_path: Path,
) -> None:
    with run(tmp_path / "a", 60) as first:
        rows, digest = list(first.rows_without_wall_time()), first.digest()
    ticks = iter(range(10**6))
    other = SqliteJournal.create(
        tmp_path / "b", scripted.META, wall_clock=lambda: next(ticks) * 7.5,
        batching=Batching(max_rows=3),
    )  # fmt: skip
    state = scripted.beginning()
    for _ in range(60):
        scripted.step(state, other)
    with other:
        assert list(other.rows_without_wall_time()) == rows
        assert other.digest() == digest
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in "ab"]
    assert metrics[0] == metrics[1] != ""


def test_a_different_run_has_a_different_digest(tmp_path: Path) -> None:
    with run(tmp_path / "a", 20) as first, run(tmp_path / "b", 21) as other:
        assert first.digest() != other.digest()


def test_an_event_is_followed_by_its_instructions(tmp_path: Path) -> None:
    with run(tmp_path, 40):
        pass
    with RunReader(tmp_path) as reader:
        rows = list(reader.rows())
    assert rows[0].kind == "event" and rows[0].name == "ClientJoined"
    started = next(index for index, row in enumerate(rows) if row.name == "RunStarted")
    after = [row.name for row in rows[started + 1 : started + 5]]
    assert after == ["Evaluate", "Dispatch", "Dispatch", "Dispatch"]
    names = {row.name for row in rows}
    assert names >= {"UpdateArrived", "Publish", "Reject", "TaskFailed", "Cohort", "SetTimer"}


@pytest.mark.parametrize(
    "batching",
    [
        Batching(max_rows=9, max_wait_s=math.inf),
        Batching(max_rows=10**9, max_chars=370, max_wait_s=math.inf),
        Batching(max_rows=10**9, max_chars=10**9, max_wait_s=9.0),
    ],
)
def test_rows_are_committed_by_count_size_or_time(tmp_path: Path, batching: Batching) -> None:
    now_s = iter(range(10**6))
    journal = SqliteJournal.create(
        tmp_path, scripted.META, wall_clock=lambda: float(next(now_s)), batching=batching
    )
    counts = []
    for _ in range(40):
        journal.record(TaskFailed(0.0, 1, 1, "x" * 20), ())
        counts.append(committed(tmp_path))
    with journal:
        assert counts[0] == 0
        assert 20 <= counts[-1] < 40
        assert len(set(counts)) > 2
        journal.flush()
        assert committed(tmp_path) == 40


def test_a_commit_never_splits_an_event_from_its_instructions(tmp_path: Path) -> None:
    journal, _ = scripted.create(tmp_path, batching=Batching(max_rows=2))
    state = scripted.beginning()
    with journal:
        for _ in range(30):
            scripted.step(state, journal)
            whole = journal.seq
            assert committed(tmp_path) in (whole, whole - 1)


def test_an_uploads_fate_follows_it_across_batches(tmp_path: Path) -> None:
    adapter = make_adapter(2)
    with SqliteJournal.create(tmp_path, scripted.META) as journal:
        journal.record(arrived(0), ())
        journal.flush()
        journal.record(arrived(1, 2, metrics={"loss": 1.5}), ())
        applied = (
            AppliedUpload(0, 1, 0, 0, 0.5, 2.0),
            AppliedUpload(1, 2, 0, 3, -0.0, math.inf, 0.25),
        )
        journal.record(arrived(2, 3), [Publish(1, adapter, applied, {"gain": math.nan})])
        journal.flush()
        with RunReader(tmp_path) as reader:
            first, second, third = reader.uploads()
            (version,) = reader.versions()
    assert (first.outcome, first.weight, first.norm, first.staleness) == ("applied", 0.5, 2.0, 0)
    assert (second.applied_version, second.norm, second.metrics) == (1, None, {"loss": 1.5})
    assert first.reason is None
    assert second.reason == "cut"
    assert second.detail is not None and "multiplied by 0.25" in second.detail
    assert (third.outcome, third.applied_version) == ("buffered", None)
    assert version.adapter == adapter.checksum
    assert (version.uploads, version.staleness_mean, version.staleness_max) == (2, 1.5, 3)
    assert version.notes == {"gain": "nan"}


def test_a_repeated_upload_is_recorded_beside_the_accepted_one(tmp_path: Path) -> None:
    with SqliteJournal.create(tmp_path, scripted.META) as journal:
        journal.record(arrived(0), ())
        journal.record(arrived(0), [Reject(0, 1, RejectReason.TASK_USED, "task 0 was answered")])
        applied = (AppliedUpload(0, 1, 0, 0, 1.0, 2.0),)
        journal.record(arrived(1), [Publish(1, make_adapter(), applied)])
        journal.flush()
        with RunReader(tmp_path) as reader:
            outcomes = [(upload.task_id, upload.outcome) for upload in reader.uploads()]
            assert reader.rejections() == {"task_used": 1}
    assert outcomes == [(0, "applied"), (0, "rejected"), (1, "buffered")]


def test_a_refusal_without_an_upload_is_recorded_as_one(tmp_path: Path) -> None:
    with SqliteJournal.create(tmp_path, scripted.META) as journal:
        journal.record(arrived(4), ())
        refusal = Reject(4, 9, RejectReason.WRONG_CLIENT, "payload is not an adapter")
        journal.record(TaskFailed(2.0, 4, 9, "unreadable"), [refusal])
        journal.flush()
        with RunReader(tmp_path) as reader:
            kept, refused = reader.uploads()
    assert kept.outcome == "buffered"
    assert (refused.client_id, refused.reason, refused.base_version) == (9, "wrong_client", None)


@pytest.mark.parametrize(
    "hostile",
    [
        {"task_id": 2**70},
        {"task_id": "0; DROP TABLE rows"},
        {"task_id": [1, 2]},
        {"client_id": None},
        {"client_id": b"\x00"},
        {"base_version": -(2**64)},
        {"base_version": 1.5},
        {"num_examples": math.nan},
        {"num_examples": True},
        {"metrics": {"loss": math.nan, "bound": -math.inf}},
        {"metrics": {3: "x", ("a",): object(), "\ud800": "\udfff"}},
        {"metrics": {"text": "y" * 100_000, "nested": {"a": {1, 2}}}},
        {
            "adapter": Adapter(
                make_adapter().layout, {torch.complex64: torch.zeros((), dtype=torch.complex64)}
            )
        },
    ],
)
def test_a_hostile_upload_is_recorded_and_never_stops_the_journal(
    tmp_path: Path, hostile: dict[str, Any]
) -> None:
    event = arrived(**({"task_id": 7} | hostile))
    detail = f"\ud800 {hostile!r}" * 50
    refusal = Reject(
        event.update.task_id, event.update.client_id, RejectReason.UNKNOWN_TASK, detail
    )
    with SqliteJournal.create(tmp_path, scripted.META) as journal:
        journal.record(event, [refusal])
        journal.record(RunStarted(2.0), ())
    with RunReader(tmp_path) as reader:
        (upload,) = reader.uploads()
        rows = list(reader.rows())
    assert (upload.outcome, upload.reason) == ("rejected", "unknown_task")
    assert len(rows) == 3
    assert sum(len(json.dumps(dict(row.body))) for row in rows) < 20_000


def test_only_accepted_uploads_are_hashed_and_only_when_asked(tmp_path: Path) -> None:
    for name, checksums in (("with", True), ("without", False)):
        root = tmp_path / name
        with SqliteJournal.create(root, scripted.META, checksums=checksums) as journal:
            journal.record(arrived(0), ())
            journal.record(arrived(1), [Reject(1, 1, RejectReason.NOT_FINITE, "NaN")])
        with RunReader(root) as reader:
            bodies = [row.body for row in reader.rows(name="UpdateArrived")]
        expected = make_adapter().checksum if checksums else None
        assert [body.get("adapter") for body in bodies] == [expected, None]


def test_a_publish_of_uploads_the_journal_never_saw_is_refused(tmp_path: Path) -> None:
    with SqliteJournal.create(tmp_path, scripted.META) as journal:
        applied = (AppliedUpload(5, 1, 0, 0, 1.0, 1.0),)
        with pytest.raises(JournalError, match="applies task 5"):
            journal.record(RunStarted(0.0), [Publish(1, make_adapter(), applied)])
        with pytest.raises(JournalError, match="takes no rows"):
            journal.record(RunStarted(0.0), ())
    assert committed(tmp_path) == 0


def test_an_interrupt_inside_a_record_reaches_the_disk_in_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = run(tmp_path, 20)
    journal.flush()
    before = committed(tmp_path)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("alignfed.journal.derived.DerivedTables.evaluated", interrupt)
    with pytest.raises(KeyboardInterrupt):
        journal.record(EvaluationFinished(1.0, 1, 0.5), ())
    journal.close()
    assert committed(tmp_path) == before


def test_a_full_disk_is_reported_and_the_rows_are_kept_for_another_try(tmp_path: Path) -> None:
    journal = run(tmp_path, 20, batching=Batching(max_rows=10**9))
    (pages,) = next(iter(journal.database.query("PRAGMA page_count")))
    list(journal.database.query(f"PRAGMA max_page_count = {pages}"))
    journal.record_note(0.0, "large", {"text": "x" * 100_000})
    with pytest.raises(JournalError, match="disk has space"):
        journal.flush()
    list(journal.database.query("PRAGMA max_page_count = 100000"))
    journal.flush()
    journal.close()
    assert committed(tmp_path) == journal.seq


def test_a_directory_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    with run(tmp_path, 5) as journal:
        digest = journal.digest()
    with pytest.raises(JournalError, match="already holds a run"):
        SqliteJournal.create(tmp_path, scripted.META)
    with RunReader(tmp_path) as reader:
        assert reader.last()[0] == journal.seq
    reopened, checkpoints = scripted.reopen(tmp_path)
    assert reopened.digest() == digest
    reopened.close()
    assert checkpoints is not None


def test_one_process_cannot_open_a_directory_twice(tmp_path: Path) -> None:
    with run(tmp_path, 5), pytest.raises(JournalError, match="in use by process"):
        SqliteJournal(tmp_path)
    SqliteJournal(tmp_path).close()


def test_a_closed_or_unrecovered_journal_takes_no_rows(tmp_path: Path) -> None:
    journal = run(tmp_path, 5)
    journal.close()
    journal.close()
    with pytest.raises(JournalError, match="takes no rows"):
        journal.record(ClientJoined(0.0, 1), ())
    with SqliteJournal(tmp_path) as opened, pytest.raises(JournalError, match="not recovered"):
        opened.record_cohort(0.0, [1])


def test_a_finished_journal_is_one_plain_file(tmp_path: Path) -> None:
    run(tmp_path, 30).close()
    assert {path.name for path in tmp_path.glob("journal.sqlite*")} == {"journal.sqlite"}


def test_an_unknown_event_or_instruction_is_refused(tmp_path: Path) -> None:
    with SqliteJournal.create(tmp_path, scripted.META) as journal:
        with pytest.raises(JournalError, match="cannot record a Surprise"):
            journal.record(Surprise(), ())  # type: ignore[arg-type]
        with pytest.raises(JournalError, match="cannot record a str"):
            journal.record(RunStarted(0.0), ["Dispatch"])  # type: ignore[list-item]
        assert journal.seq == 0

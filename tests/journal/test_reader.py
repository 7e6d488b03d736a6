"""What a report reads agrees with the coordinator that made the run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from alignfed.errors import JournalError
from alignfed.journal import RunReader, SqliteJournal
from tests.journal import scripted


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, scripted.DriverState]:
    journal, _ = scripted.create(tmp_path)
    state = scripted.beginning()
    with journal:
        for _ in range(120):
            scripted.step(state, journal)
    return tmp_path, state


def test_counts_agree_with_the_coordinators(
    finished: tuple[Path, scripted.DriverState],
) -> None:
    root, state = finished
    coordinator = state.coordinator
    with RunReader(root) as reader:
        outcomes = reader.outcomes()
        assert reader.rejections() == dict(coordinator.rejections)
        assert reader.participation() == {
            client_id: record.uploads for client_id, record in coordinator.clients.items()
        }
        assert outcomes.get("buffered", 0) == len(coordinator.buffer)
        assert outcomes["applied"] + outcomes.get("buffered", 0) == coordinator.accepted
        assert [version.version for version in reader.versions()] == list(
            range(1, coordinator.version + 1)
        )
        assert list(reader.versions())[-1].adapter == coordinator.adapter.checksum
        best = min(item.loss for item in reader.evaluations() if item.loss is not None)
        assert best == coordinator.best_loss
        staleness = Counter(upload.staleness for upload in reader.uploads("applied"))
        assert reader.staleness_histogram() == dict(staleness)
        assert sum(reader.staleness_histogram().values()) == outcomes["applied"]
        assert reader.meta["seed"] == "7"


def test_a_client_that_joined_and_gave_nothing_counts_as_zero(tmp_path: Path) -> None:
    journal, _ = scripted.create(tmp_path)
    state = scripted.beginning()
    with journal:
        for _ in range(scripted.CLIENTS):
            scripted.step(state, journal)
    with RunReader(tmp_path) as reader:
        assert reader.participation() == dict.fromkeys(range(scripted.CLIENTS), 0)


def test_rows_can_be_followed_and_filtered(finished: tuple[Path, scripted.DriverState]) -> None:
    with RunReader(finished[0]) as reader:
        everything = list(reader.rows())
        seq, time_s = reader.last()
        assert (everything[-1].seq, everything[-1].time_s) == (seq, time_s)
        assert list(reader.rows(after=seq - 3)) == everything[-3:]
        dispatched = [row for row in everything if row.name == "Dispatch"]
        assert list(reader.rows(name="Dispatch")) == dispatched
        assert [row.task_id for row in dispatched] == list(range(len(dispatched)))
        assert all(set(cohort) <= set(range(len(dispatched))) for cohort in reader.cohorts())
        assert len(list(reader.cohorts())) == 30


def test_an_empty_run_reads_as_empty(tmp_path: Path) -> None:
    with scripted.create(tmp_path)[0], RunReader(tmp_path) as reader:
        assert reader.last() == (0, 0.0)
        assert reader.outcomes() == reader.rejections() == reader.staleness_histogram() == {}


def test_a_reader_cannot_write_and_does_not_stop_the_writer(
    finished: tuple[Path, scripted.DriverState],
) -> None:
    root, _ = finished
    with RunReader(root) as reader:
        before = reader.last()
        with SqliteJournal(root) as journal:
            journal.cut(0)
            assert reader.last() == (0, 0.0)
        with pytest.raises(JournalError, match="readonly"):
            list(reader.database.query("DELETE FROM meta"))
        assert before[0] > 0

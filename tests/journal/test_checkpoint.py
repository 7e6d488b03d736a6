"""A run goes on from its newest whole checkpoint, and damage is told, not passed over."""

from __future__ import annotations

import shutil
import sqlite3
import zlib
from pathlib import Path

import pytest
import torch

from alignfed.errors import JournalError
from alignfed.journal import Checkpoints, Codec, RunReader, SqliteJournal
from tests.core.adapters import make_adapter
from tests.journal import scripted


def run_with_checkpoints(root: Path, steps: int, every: int) -> scripted.DriverState:
    journal, checkpoints = scripted.create(root)
    state = scripted.beginning()
    with journal:
        for _ in range(steps):
            scripted.step(state, journal)
            if state.steps % every == 0:
                checkpoints.write(state)
    return state


def blobs(root: Path) -> set[str]:
    return {path.stem for path in (root / "checkpoints").iterdir()}


def needed(root: Path, offset: int = 0) -> set[str]:
    """Files the newest (or an older) checkpoint refers to."""
    connection = sqlite3.connect(root / "journal.sqlite")
    query = "SELECT adapters, tensors FROM checkpoints ORDER BY id DESC LIMIT 1 OFFSET ?"
    adapters, tensors = connection.execute(query, (offset,)).fetchone()
    connection.close()
    return {*adapters.split(), *tensors.split()}


def only_in_newest(root: Path) -> Path:
    (name, *_) = sorted(needed(root) - needed(root, 1))
    return root / "checkpoints" / f"{name}.safetensors"


@pytest.mark.parametrize("stop_at", [30, 36, 41])
def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path: Path, stop_at: int) -> None:
    expected = scripted.Undisturbed(tmp_path / "expected")
    with expected.journal:
        expected_rows = expected.advance(70)
    run_with_checkpoints(tmp_path / "run", stop_at, every=12)
    journal, checkpoints = scripted.reopen(tmp_path / "run")
    with journal:
        state = checkpoints.recover().state
        assert state.steps == stop_at // 12 * 12
        while state.steps < 70:
            scripted.step(state, journal)
        assert list(journal.rows_without_wall_time()) == expected_rows
    assert scripted.fingerprint(state) == scripted.fingerprint(expected.state)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "expected")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("stop_at", range(24, 36))
def test_recovered_tables_are_as_they_were_at_the_checkpoint(tmp_path: Path, stop_at: int) -> None:
    expected = scripted.Undisturbed(tmp_path / "expected")
    with expected.journal:
        expected.advance(24)
    run_with_checkpoints(tmp_path / "run", stop_at, every=12)
    journal, checkpoints = scripted.reopen(tmp_path / "run")
    with journal:
        assert checkpoints.recover().seq == expected.journal.seq
    with RunReader(tmp_path / "run") as found, RunReader(expected.root) as wanted:
        assert list(found.uploads()) == list(wanted.uploads())
        assert list(found.versions()) == list(wanted.versions())
        assert list(found.evaluations()) == list(wanted.evaluations())
        assert wanted.outcomes()["buffered"] > 0


def test_snapshots_share_memory_after_recovery(tmp_path: Path) -> None:
    run_with_checkpoints(tmp_path, 36, every=12)
    journal, checkpoints = scripted.reopen(tmp_path)
    with journal:
        state = checkpoints.recover().state.coordinator
    assert state.snapshots[state.version].adapter is state.adapter
    layouts = {id(snapshot.adapter.layout) for snapshot in state.snapshots.values()}
    assert len(layouts) == 1


def test_a_run_killed_before_its_first_checkpoint_begins_from_the_beginning(
    tmp_path: Path,
) -> None:
    run_with_checkpoints(tmp_path, 20, every=100)
    journal, checkpoints = scripted.reopen(tmp_path)
    with journal:
        recovered = checkpoints.recover()
        assert (recovered.state, recovered.seq, recovered.warnings) == (None, 0, ())
        assert list(journal.rows_without_wall_time()) == []
        assert checkpoints.read_latest() is None
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    with RunReader(tmp_path) as reader:
        assert not list(reader.uploads()) and not list(reader.versions())


def test_cohorts_taken_back_are_handed_over_until_a_checkpoint_has_passed_them(
    tmp_path: Path,
) -> None:
    run_with_checkpoints(tmp_path, 35, every=12)
    with RunReader(tmp_path) as reader:
        cohorts = [row for row in reader.rows(name="Cohort")]
    for _ in range(2):  # the second recovery follows a resumed run that was killed at once
        journal, checkpoints = scripted.reopen(tmp_path)
        with journal:
            recovered = checkpoints.recover()
        assert recovered.undone == tuple(row for row in cohorts if row.seq > recovered.seq)
        assert len(recovered.undone_cohorts) == 2
        assert recovered.undone_cohorts[0] == tuple(recovered.undone[0].body["task_ids"])
    journal, checkpoints = scripted.reopen(tmp_path)
    with journal:
        state = checkpoints.recover().state
        while state.steps < 48:
            scripted.step(state, journal)
        checkpoints.write(state)
    journal, checkpoints = scripted.reopen(tmp_path)
    with journal:
        assert checkpoints.recover().undone == ()
        assert list(journal.database.query("SELECT * FROM undone")) == []


def test_files_are_written_once_and_deleted_when_no_checkpoint_needs_them(
    tmp_path: Path,
) -> None:
    journal, checkpoints = scripted.create(tmp_path)
    folder = tmp_path / "checkpoints"
    with journal:
        first, shared = make_adapter(1), make_adapter(2, dtype=torch.bfloat16)
        checkpoints.write([first, shared, torch.ones(3)])
        inodes = {path.name: path.stat().st_ino for path in folder.iterdir()}
        assert len(inodes) == 3
        checkpoints.write([make_adapter(3), shared])
        assert {
            path.name: path.stat().st_ino for path in folder.iterdir()
        }.items() >= inodes.items()
        checkpoints.write([shared])
        assert blobs(tmp_path) == {make_adapter(3).checksum, shared.checksum}
        checkpoints.write([shared])
        assert blobs(tmp_path) == {shared.checksum}


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "flipped", "other", "garbage"])
def test_a_damaged_file_falls_back_to_the_checkpoint_before_and_says_so(
    tmp_path: Path, damage: str
) -> None:
    run_with_checkpoints(tmp_path, 36, every=12)
    path = only_in_newest(tmp_path)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "other":
        (other, *_) = sorted(needed(tmp_path) - {path.stem})
        shutil.copy(path.with_name(f"{other}.safetensors"), path)
    else:
        path.write_bytes(
            {
                "truncated": data[:-5],
                "empty": b"",
                "flipped": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
                "garbage": b"\xff" * len(data),
            }[damage]
        )
    journal, checkpoints = scripted.reopen(tmp_path)
    with journal:
        recovered = checkpoints.recover()
        assert recovered.state.steps == 24
        (warning,) = recovered.warnings
        assert "was passed over" in warning and path.name in warning
        # The same adapter comes up again when the run goes on: it must be written anew.
        while recovered.state.steps < 36:
            scripted.step(recovered.state, journal)
        checkpoints.write(recovered.state)
    journal, checkpoints = scripted.reopen(tmp_path)
    with journal:
        again = checkpoints.recover()
        assert again.warnings == () and again.state.steps == 36
    assert path.read_bytes() == data


def test_a_damaged_state_falls_back_too(tmp_path: Path) -> None:
    run_with_checkpoints(tmp_path, 24, every=12)
    with sqlite3.connect(tmp_path / "journal.sqlite") as connection:
        query = "UPDATE checkpoints SET state = substr(state, 1, 40) WHERE id = 2"
        assert connection.execute(query).rowcount == 1
    connection.close()
    journal, checkpoints = scripted.reopen(tmp_path)
    with journal:
        recovered = checkpoints.recover()
    assert recovered.state.steps == 12
    assert "cannot be decompressed" in recovered.warnings[0]


def test_when_every_checkpoint_is_damaged_nothing_is_cut_and_the_remedy_is_named(
    tmp_path: Path,
) -> None:
    run_with_checkpoints(tmp_path, 36, every=12)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    with RunReader(tmp_path) as reader:
        before = reader.last()
    journal, checkpoints = scripted.reopen(tmp_path)
    with journal, pytest.raises(JournalError, match=r"every checkpoint .* backup"):
        checkpoints.recover()
    with RunReader(tmp_path) as reader:
        assert reader.last() == before


@pytest.mark.parametrize("offset", [0, 20, 5000])
def test_a_damaged_database_is_told_with_the_remedy(tmp_path: Path, offset: int) -> None:
    run_with_checkpoints(tmp_path, 36, every=12)
    path = tmp_path / "journal.sqlite"
    data = bytearray(path.read_bytes())
    data[offset : offset + 4000] = b"\xa5" * 4000
    path.write_bytes(data)
    with pytest.raises(JournalError, match=r"damaged.*backup") as refusal:
        journal, checkpoints = scripted.reopen(tmp_path)
        with journal:
            checkpoints.recover()
    assert refusal.value.values["path"] == str(path)
    shutil.rmtree(tmp_path / "checkpoints")


def test_a_truncated_or_foreign_database_is_refused(tmp_path: Path) -> None:
    run_with_checkpoints(tmp_path / "run", 36, every=12)
    path = tmp_path / "run" / "journal.sqlite"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(JournalError):
        journal, checkpoints = scripted.reopen(tmp_path / "run")
        with journal:
            checkpoints.recover()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    sqlite3.connect(foreign / "journal.sqlite").close()
    (foreign / "journal.sqlite").touch()
    for opener in (SqliteJournal, RunReader):
        with pytest.raises(JournalError, match="has format None"):
            opener(foreign)
        with pytest.raises(JournalError, match="holds no run"):
            opener(tmp_path / "nowhere")


def test_another_format_or_recipe_is_refused(tmp_path: Path) -> None:
    run_with_checkpoints(tmp_path, 24, every=12)
    journal, checkpoints = scripted.reopen(tmp_path)
    with journal, pytest.raises(JournalError, match="another recipe"):
        checkpoints.recover(recipe_sha256="cd" * 32)
    journal, checkpoints = scripted.reopen(tmp_path)
    with journal:
        assert checkpoints.recover(recipe_sha256=scripted.META.recipe_sha256).state is not None
    with sqlite3.connect(tmp_path / "journal.sqlite") as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'format'")
    connection.close()
    with pytest.raises(JournalError, match="has format 99"):
        scripted.reopen(tmp_path)


def test_a_codec_that_lacks_a_class_is_an_error_and_not_damage(tmp_path: Path) -> None:
    run_with_checkpoints(tmp_path, 24, every=12)
    with SqliteJournal(tmp_path) as journal:
        checkpoints = Checkpoints(journal, Codec())
        with pytest.raises(JournalError, match="needs the class DriverState"):
            checkpoints.recover()
    journal, checkpoints = scripted.reopen(tmp_path)
    with journal:
        assert checkpoints.recover().state.steps == 24


def test_a_state_that_cannot_be_encoded_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    journal, checkpoints = scripted.create(tmp_path)
    with journal:
        checkpoints.write([1])
        with pytest.raises(JournalError, match=r"state\[0\]"):
            checkpoints.write([object()])
        assert checkpoints.read_latest() == (0, [1])


def test_a_checkpoint_is_compressed_json(tmp_path: Path) -> None:
    run_with_checkpoints(tmp_path, 12, every=12)
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    (state,) = connection.execute("SELECT state FROM checkpoints").fetchone()
    connection.close()
    assert zlib.decompress(state).startswith(b'{"format":1,')

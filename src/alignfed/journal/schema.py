"""The tables of ``journal.sqlite``.

``rows`` is the record; ``uploads``, ``versions`` and ``evaluations`` are derived from it for
reading, and every row of theirs knows the ``seq`` that made or last changed it, so that all can be
cut back to a checkpoint. ``undone`` holds cohorts and notes that were cut and not reached again.
``wall_time_s`` alone may differ between two runs of one seed.
"""

from __future__ import annotations

import sqlite3
from dataclasses import asdict, dataclass
from pathlib import Path

from alignfed.errors import JournalError
from alignfed.journal.database import Database, sqlite_errors

FORMAT = 1
"""Version of the tables."""

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE rows (
    seq INTEGER PRIMARY KEY, time_s REAL NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
    client_id INTEGER, task_id INTEGER, version INTEGER, body TEXT NOT NULL,
    wall_time_s REAL NOT NULL
);
CREATE TABLE undone (
    seq INTEGER PRIMARY KEY, time_s REAL NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
    client_id INTEGER, task_id INTEGER, version INTEGER, body TEXT NOT NULL
);
CREATE TABLE uploads (
    seq INTEGER PRIMARY KEY, task_id INTEGER, client_id INTEGER, base_version INTEGER,
    arrived_s REAL NOT NULL, num_examples INTEGER,
    -- Not IN: SQLite would build its list anew for every row, for as long as the rest takes.
    outcome TEXT NOT NULL CHECK (
        outcome = 'applied' OR outcome = 'buffered' OR outcome = 'rejected'
    ),
    outcome_seq INTEGER NOT NULL, reason TEXT, detail TEXT, applied_version INTEGER,
    staleness INTEGER, weight REAL, norm REAL
);
CREATE TABLE versions (
    seq INTEGER PRIMARY KEY, version INTEGER NOT NULL, time_s REAL NOT NULL,
    adapter TEXT NOT NULL, uploads INTEGER NOT NULL, staleness_mean REAL, staleness_max INTEGER,
    bytes_moved INTEGER NOT NULL, calibration_tokens INTEGER NOT NULL, notes TEXT NOT NULL
);
CREATE TABLE evaluations (
    seq INTEGER PRIMARY KEY, time_s REAL NOT NULL, version INTEGER NOT NULL,
    loss REAL, score REAL
);
CREATE TABLE checkpoints (
    id INTEGER PRIMARY KEY AUTOINCREMENT, seq INTEGER NOT NULL, adapters TEXT NOT NULL,
    tensors TEXT NOT NULL, state BLOB NOT NULL, wall_time_s REAL NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class RunMeta:
    """What a run is, fixed when it begins.

    Attributes:
        alignfed_version: version of the package that began it.
        recipe_sha256: SHA-256 of the resolved recipe.
        seed: the run's seed.
        inputs: fingerprints of what it reads from outside, as a JSON object.
        replay: what a replay must know besides recipe and rows (``facts.py``), likewise.
    """

    alignfed_version: str
    recipe_sha256: str
    seed: int
    inputs: str = "{}"
    replay: str = "{}"


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """A checkpoint as the journal stores it.

    Attributes:
        seq: the last row it covers.
        adapters: checksums of the adapters the state refers to.
        tensors: checksums of its other tensors.
        state: the state's text, compressed.
    """

    seq: int
    adapters: tuple[str, ...]
    tensors: tuple[str, ...]
    state: bytes


def make_tables(path: Path, meta: RunMeta, first: CheckpointRow | None = None) -> None:
    """Make a new journal file with what the run is, and perhaps a first checkpoint.

    It is left to the caller to force it to disk.

    Raises:
        JournalError: it cannot be written.
    """
    path.unlink(missing_ok=True)
    with sqlite_errors(path):
        connection = sqlite3.connect(path)
        try:
            # Pages set free can be given back to the disk, though only when somebody asks.
            pragmas = "PRAGMA synchronous=OFF; PRAGMA auto_vacuum=INCREMENTAL"
            connection.executescript(f"{pragmas}; BEGIN; {TABLES}")
            entries = {"format": FORMAT, **asdict(meta)}
            connection.executemany(
                "INSERT INTO meta VALUES (?, ?)", [(k, str(v)) for k, v in entries.items()]
            )
            if first is not None:
                insert_checkpoint(connection, first, 0.0)
            connection.commit()
        finally:
            connection.close()


def read_meta(database: Database) -> dict[str, str]:
    """Return what the run is.

    Raises:
        JournalError: not a journal, or one of another format.
    """
    found = list(database.query("SELECT name FROM sqlite_master WHERE name = 'meta'"))
    meta: dict[str, str] = dict(database.query("SELECT key, value FROM meta") if found else ())
    if meta.get("format") != str(FORMAT):
        raise JournalError(
            f"{database.path} has format {meta.get('format')} (AlignFed"
            f" {meta.get('alignfed_version')}), this version reads {FORMAT}; open it with the"
            " version that wrote it",
            path=str(database.path),
            format=meta.get("format"),
        )
    return meta


def insert_checkpoint(
    connection: sqlite3.Connection, checkpoint: CheckpointRow, wall_time_s: float
) -> None:
    """Add a checkpoint; forget what was undone before it."""
    connection.execute(
        "INSERT INTO checkpoints (seq, adapters, tensors, state, wall_time_s)"
        " VALUES (?, ?, ?, ?, ?)",
        (
            checkpoint.seq,
            " ".join(checkpoint.adapters),
            " ".join(checkpoint.tensors),
            checkpoint.state,
            wall_time_s,
        ),
    )
    connection.execute("DELETE FROM undone WHERE seq <= ?", (checkpoint.seq,))

"""Checkpoints: what a run needs to go on as if it had never been interrupted.

Files first, then one transaction for the rows and the checkpoint, then the clean-up: whenever the
process dies, either this checkpoint or the one before it is whole, with its rows.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

from alignfed.errors import JournalError
from alignfed.journal.blobs import BlobStore
from alignfed.journal.codec import Codec, Encoded
from alignfed.journal.database import DamagedError, Database
from alignfed.journal.payloads import Payloads
from alignfed.journal.rows import Row
from alignfed.journal.schema import CheckpointRow
from alignfed.journal.store import SqliteJournal

KEPT_CHECKPOINTS = 2
"""The newest, and one to fall back to should a file of the newest be damaged."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """Where a run goes on.

    Attributes:
        state: what the newest whole checkpoint holds; None: begin from the beginning.
        seq: the last row that counts; rows after it were taken back.
        undone: cohorts and notes among the rows taken back, now or by an earlier recovery that
            was itself cut short, in order. Whoever goes on must
            compute the same tasks together again, or results may differ in their last bits.
        warnings: damage that was met and passed over, in words.
    """

    state: Any
    seq: int
    undone: tuple[Row, ...]
    warnings: tuple[str, ...]

    @property
    def undone_cohorts(self) -> tuple[tuple[int, ...], ...]:
        """Task ids of each cohort taken back, in order."""
        return tuple(tuple(row.body["task_ids"]) for row in self.undone if row.kind == "cohort")


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that is there; whether it is whole shows when it is read."""

    checkpoint_id: int
    row: CheckpointRow


class Checkpoints:
    """Writes a run's checkpoints and recovers from them."""

    def __init__(
        self, journal: SqliteJournal, codec: Codec, payloads: Payloads | None = None
    ) -> None:
        """Use the journal's directory.

        Args:
            journal: just created, or opened and about to be recovered.
            codec: knows every class that the state holds.
            payloads: what rows name and is kept in the same folder, if anything is.
        """
        self._journal = journal
        self._codec = codec
        self._payloads = payloads
        self.blobs = (
            BlobStore(journal.directory.checkpoints) if payloads is None else payloads.blobs
        )

    def write(self, state: Any) -> None:
        """Commit all rows so far together with ``state``; when this returns, both are on disk.

        Raises:
            JournalError: the state holds what the codec does not know, or the disk is full.
        """
        self._journal.commit(put_checkpoint(state, self._journal.seq, self._codec, self.blobs))
        self._drop_superfluous()
        self.collect()

    def read_latest(self) -> tuple[int, Any] | None:
        """Return ``(seq, state)`` of the newest whole checkpoint; None where none was written.

        Raises:
            JournalError: there are checkpoints and every one is damaged.
        """
        saved = self.newest_whole([])
        return None if saved is None else (saved[0].row.seq, saved[1])

    def recover(self, *, recipe_sha256: str | None = None) -> Recovered:
        """Cut the journal back to its newest whole checkpoint, after which it records again.

        Args:
            recipe_sha256: hash of the recipe the run must have been begun with.

        Raises:
            JournalError: the journal or every checkpoint is damaged, or the recipe is another.
        """
        journal = self._journal
        self.check(recipe_sha256)
        warnings: list[str] = []
        found = self.newest_whole(warnings)
        seq, checkpoint_id, state = 0, 0, None
        if found is not None:
            saved, state = found
            seq, checkpoint_id = saved.row.seq, saved.checkpoint_id
        journal.cut(seq, checkpoint_id)
        undone = tuple(
            Row(*(*columns, json.loads(body)))
            for *columns, body in journal.database.query(
                "SELECT seq, time_s, kind, name, client_id, task_id, version, body FROM undone"
                " WHERE seq > ? ORDER BY seq",
                (seq,),
            )
        )
        if self._payloads is not None:
            self._payloads.load(journal.database, self.oldest_seq())
        self.collect()
        return Recovered(state, seq, undone, tuple(warnings))

    def check(self, recipe_sha256: str | None) -> None:
        """Check that the journal is whole and of the recipe that is given, if one is.

        Raises:
            JournalError: it is not.
        """
        journal = self._journal
        begun_with = journal.meta["recipe_sha256"]
        if recipe_sha256 is not None and recipe_sha256 != begun_with:
            raise JournalError(
                f"{journal.directory.root} was begun with another recipe (SHA-256"
                f" {begun_with[:12]}, not {recipe_sha256[:12]}); resume it unchanged, or begin a"
                " new run in another directory",
                path=str(journal.directory.root),
            )
        journal.database.check_pages()

    def newest_whole(self, warnings: list[str]) -> tuple[SavedCheckpoint, Any] | None:
        """Return the newest whole checkpoint and its state; None where none was written.

        Args:
            warnings: is told of damaged ones, in words.

        Raises:
            JournalError: there are checkpoints and every one is damaged.
        """
        checkpoints = saved_checkpoints(self._journal.database)[::-1]
        for saved in checkpoints:
            try:
                return saved, load_checkpoint(saved, self._codec, self.blobs)
            except DamagedError as error:
                warnings.append(f"checkpoint at row {saved.row.seq} was passed over: {error}")
        if checkpoints:
            raise JournalError(
                f"every checkpoint of {self._journal.directory.root} is damaged:"
                f" {'; '.join(warnings)}; restore the directory from a backup, or begin the run"
                " again in a new one",
                path=str(self._journal.directory.root),
            )
        return None

    def collect(self) -> None:
        """Delete every file that no checkpoint and no row that is to be replayed needs.

        Raises:
            JournalError: a file cannot be deleted.
        """
        keep: set[str] = set()
        for saved in saved_checkpoints(self._journal.database):
            keep.update(saved.row.adapters, saved.row.tensors)
        if self._payloads is not None:
            keep |= self._payloads.needed(self.oldest_seq())
        self.blobs.collect(keep)

    def _drop_superfluous(self) -> None:
        """Keep the newest, and older ones as far back as ``Payloads`` reach, at a distance."""
        database, payloads = self._journal.database, self._payloads
        found = list(database.query("SELECT id, seq FROM checkpoints ORDER BY id"))
        older = found[:-KEPT_CHECKPOINTS]
        kept = set() if payloads is None else payloads.starts([seq for _, seq in older])
        doomed = [(number,) for number, seq in older if seq not in kept]
        if doomed:
            with database.transaction() as connection:
                connection.executemany("DELETE FROM checkpoints WHERE id = ?", doomed)

    def oldest_seq(self) -> int:
        """Return the last row that the oldest checkpoint covers; what follows can be replayed."""
        (found,) = next(self._journal.database.query("SELECT MIN(seq) FROM checkpoints"))
        return found or 0


def put_checkpoint(state: Any, seq: int, codec: Codec, blobs: BlobStore) -> CheckpointRow:
    """Force a state's adapters and tensors to disk; return the row that refers to them.

    Raises:
        JournalError: the state holds what the codec does not know, or the disk is full.
    """
    encoded = codec.encode(state)
    blobs.write(encoded.adapters, encoded.tensors)
    return CheckpointRow(
        seq=seq,
        adapters=tuple(encoded.adapters),
        tensors=tuple(encoded.tensors),
        state=zlib.compress(encoded.text.encode(), level=1),
    )


def saved_checkpoints(database: Database) -> list[SavedCheckpoint]:
    """Return the checkpoints that are kept, oldest first.

    Raises:
        JournalError: the journal is damaged.
    """
    return [
        SavedCheckpoint(number, CheckpointRow(seq, _split(adapters), _split(tensors), state))
        for number, seq, adapters, tensors, state in database.query(
            "SELECT id, seq, adapters, tensors, state FROM checkpoints ORDER BY id"
        )
    ]


def load_checkpoint(saved: SavedCheckpoint, codec: Codec, blobs: BlobStore) -> Any:
    """Return a checkpoint's state.

    Raises:
        DamagedError: it, or a file it needs, is missing or damaged.
        JournalError: the codec does not know what it holds.
    """
    row = saved.row
    try:
        text = zlib.decompress(row.state).decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise DamagedError(f"its state cannot be decompressed: {error}") from error
    return codec.decode(
        Encoded(
            text,
            {checksum: blobs.adapter(checksum) for checksum in row.adapters},
            {checksum: blobs.tensor(checksum) for checksum in row.tensors},
        )
    )


def _split(checksums: str) -> tuple[str, ...]:
    return tuple(checksums.split())

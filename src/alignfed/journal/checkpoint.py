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
from alignfed.journal.database import DamagedError
from alignfed.journal.rows import Row
from alignfed.journal.schema import CheckpointRow
from alignfed.journal.store import SqliteJournal


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
class _Saved:
    checkpoint_id: int
    row: CheckpointRow


class Checkpoints:
    """Writes a run's checkpoints and recovers from them."""

    def __init__(self, journal: SqliteJournal, codec: Codec) -> None:
        """Use the journal's directory.

        Args:
            journal: just created, or opened and about to be recovered.
            codec: knows every class that the state holds.
        """
        self._journal = journal
        self._codec = codec
        self._blobs = BlobStore(journal.directory.checkpoints)

    def write(self, state: Any) -> None:
        """Commit all rows so far together with ``state``; when this returns, both are on disk.

        Raises:
            JournalError: the state holds what the codec does not know, or the disk is full.
        """
        encoded = self._codec.encode(state)
        self._blobs.write(encoded.adapters, encoded.tensors)
        self._journal.commit(
            CheckpointRow(
                seq=self._journal.seq,
                adapters=tuple(encoded.adapters),
                tensors=tuple(encoded.tensors),
                state=zlib.compress(encoded.text.encode(), level=1),
            )
        )
        self._collect()

    def read_latest(self) -> tuple[int, Any] | None:
        """Return ``(seq, state)`` of the newest whole checkpoint; None where none was written.

        Raises:
            JournalError: there are checkpoints and every one is damaged.
        """
        saved = self._newest_whole([])
        return None if saved is None else (saved[0].row.seq, saved[1])

    def recover(self, *, recipe_sha256: str | None = None) -> Recovered:
        """Cut the journal back to its newest whole checkpoint, after which it records again.

        Args:
            recipe_sha256: hash of the recipe the run must have been begun with.

        Raises:
            JournalError: the journal or every checkpoint is damaged, or the recipe is another.
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
        warnings: list[str] = []
        found = self._newest_whole(warnings)
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
        self._collect()
        return Recovered(state, seq, undone, tuple(warnings))

    def _newest_whole(self, warnings: list[str]) -> tuple[_Saved, Any] | None:
        checkpoints = [
            _Saved(number, CheckpointRow(seq, _split(adapters), _split(tensors), state))
            for number, seq, adapters, tensors, state in self._journal.database.query(
                "SELECT id, seq, adapters, tensors, state FROM checkpoints ORDER BY id DESC"
            )
        ]
        for saved in checkpoints:
            try:
                return saved, self._load(saved.row)
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

    def _load(self, row: CheckpointRow) -> Any:
        try:
            text = zlib.decompress(row.state).decode()
        except (zlib.error, UnicodeDecodeError) as error:
            raise DamagedError(f"its state cannot be decompressed: {error}") from error
        return self._codec.decode(
            Encoded(
                text,
                {checksum: self._blobs.adapter(checksum) for checksum in row.adapters},
                {checksum: self._blobs.tensor(checksum) for checksum in row.tensors},
            )
        )

    def _collect(self) -> None:
        keep: set[str] = set()
        for adapters, tensors in self._journal.database.query(
            "SELECT adapters, tensors FROM checkpoints"
        ):
            keep.update(_split(adapters), _split(tensors))
        self._blobs.collect(keep)


def _split(checksums: str) -> tuple[str, ...]:
    return tuple(checksums.split())

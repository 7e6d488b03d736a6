"""A run's directory as a replay reads it; nothing is changed, and nobody need have stopped writing.

A server that goes on working gives up what a replay of it may be reading: then a file is missing,
and the refusal says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignfed.core.adapter import Adapter
from alignfed.errors import JournalError
from alignfed.journal.blobs import BlobStore
from alignfed.journal.checkpoint import load_checkpoint, saved_checkpoints
from alignfed.journal.codec import Codec
from alignfed.journal.database import DamagedError
from alignfed.journal.facts import ReplayFacts, read_facts
from alignfed.journal.reader import RunReader
from alignfed.journal.recorded import RecordedEvent, read_rows, recorded_events


class Recording:
    """The checkpoints, events and files of one run.

    Attributes:
        directory: the run's directory.
        meta: what the run is.
        facts: what a replay must know of it.
    """

    def __init__(self, root: Path) -> None:
        """Open a run's directory.

        Raises:
            JournalError: there is no run, it is damaged, or begun by a version that kept too
                little for a replay.
        """
        self._reader = RunReader(root)
        self.directory = self._reader.directory
        self.meta = self._reader.meta
        try:
            facts = read_facts(self.meta)
            if facts is None:
                raise JournalError(
                    f"{root} was begun by AlignFed {self.meta.get('alignfed_version')}, which kept"
                    " no uploads; only runs of this version and later can be replayed",
                    path=str(root),
                )
            self.facts: ReplayFacts = facts
            self.blobs = BlobStore(self.directory.checkpoints)
        except BaseException:
            self.close()
            raise

    def oldest(self, codec: Codec, warnings: list[str]) -> tuple[int, Any]:
        """Return the oldest whole checkpoint: the last row it covers, and its state.

        Args:
            codec: knows every class that the state holds.
            warnings: is told of damaged ones, in words.

        Raises:
            JournalError: none is whole.
        """
        for saved in saved_checkpoints(self._reader.database):
            try:
                return saved.row.seq, load_checkpoint(saved, codec, self.blobs)
            except DamagedError as error:
                warnings.append(f"checkpoint at row {saved.row.seq} was passed over: {error}")
        raise JournalError(
            f"{self.directory.root} holds no whole checkpoint to begin from"
            f"{': ' if warnings else ''}{'; '.join(warnings)}",
            path=str(self.directory.root),
        )

    def count_events(self, after: int) -> int:
        """Return how many events are on record after a row."""
        ((found,),) = list(
            self._reader.database.query(
                "SELECT COUNT(*) FROM rows WHERE seq > ? AND kind = 'event'", (after,)
            )
        )
        return int(found)

    def events(self, after: int) -> Iterator[RecordedEvent]:
        """Yield the events after a row, in order."""
        return recorded_events(read_rows(self._reader.database, after=after))

    def adapter(self, checksum: str) -> Adapter:
        """Read an adapter.

        Raises:
            DamagedError: it is missing or damaged.
        """
        return self.blobs.adapter(checksum)

    def close(self) -> None:
        """Close the journal."""
        self._reader.close()

    def __enter__(self) -> Recording:
        """Return itself; the block's end closes it."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

"""Adapters and tensors that rows name and a replay needs: kept while anything could ask for them.

They lie among the files of the checkpoints, under the same names, so that an upload that a
checkpoint holds too is stored once. Kept are those of all rows after the oldest checkpoint, or of
all rows there are.
"""

from __future__ import annotations

from collections import deque

from torch import Tensor

from alignfed.core.adapter import Adapter
from alignfed.errors import AdapterError
from alignfed.journal.answers import ANSWERS_NOTE, named_tensors
from alignfed.journal.blobs import BlobStore
from alignfed.journal.database import Database
from alignfed.journal.encoder import tensor_checksum
from alignfed.journal.recorded import read_rows


class Payloads:
    """Which files rows need."""

    def __init__(self, blobs: BlobStore, *, keep_all: bool) -> None:
        """Begin with none; ``load`` finds those of a run that goes on.

        Args:
            blobs: where they are kept.
            keep_all: forget none.
        """
        self.blobs = blobs
        self.keep_all = keep_all
        self._named: deque[tuple[int, str]] = deque()
        self._kept: set[str] = set()

    def load(self, database: Database, after: int) -> None:
        """Find what the committed rows after ``after`` name; with ``keep_all``, what all do."""
        self._named.clear()
        self._kept.clear()
        for row in read_rows(database, after=0 if self.keep_all else after):
            if row.kind == "note" and row.name == ANSWERS_NOTE:
                for checksum in named_tensors(row.body):
                    self._note(row.seq, checksum)
            elif row.name in ("UpdateArrived", "Publish") and "adapter" in row.body:
                self._note(row.seq, row.body["adapter"])

    def keep_adapter(self, seq: int, adapter: Adapter) -> str | None:
        """Write an adapter that row ``seq`` names; return its checksum.

        None where it is not what a file could hold: an upload need not be what it claims to be.

        Raises:
            JournalError: the disk is full or not writable.
        """
        try:
            checksum = adapter.checksum
            self.blobs.put_adapter(checksum, adapter)
        except (AdapterError, RuntimeError, TypeError):
            return None
        self._note(seq, checksum)
        return checksum

    def keep_tensor(self, seq: int, tensor: Tensor) -> str:
        """Write a tensor that row ``seq`` names; return its checksum.

        Raises:
            JournalError: the disk is full or not writable.
        """
        checksum = tensor_checksum(tensor)
        self.blobs.put_tensor(checksum, tensor)
        self._note(seq, checksum)
        return checksum

    def needed(self, after: int) -> set[str]:
        """Return the checksums that rows after ``after`` name, and forget the others."""
        if self.keep_all:
            return self._kept
        while self._named and self._named[0][0] <= after:
            self._named.popleft()
        return {checksum for _, checksum in self._named}

    def _note(self, seq: int, checksum: str) -> None:
        if self.keep_all:
            self._kept.add(checksum)
        else:
            self._named.append((seq, checksum))

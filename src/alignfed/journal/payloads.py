"""Adapters and tensors that rows name and a replay needs: kept while anything could ask for them.

They lie among the files of the checkpoints, under the same names, so that an upload that a
checkpoint holds too is stored once. Kept are those of all rows after the oldest checkpoint; how far
back that lies is decided here, by the bytes that rows since then name.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

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

    def __init__(self, blobs: BlobStore, *, keep_bytes: float) -> None:
        """Begin with none; ``load`` finds those of a run that goes on.

        Args:
            blobs: where they are kept.
            keep_bytes: how much to keep so that it can be replayed, beyond what recovery needs;
                infinity forgets nothing.
        """
        self.blobs = blobs
        self.keep_bytes = keep_bytes
        self._named: deque[tuple[int, str]] = deque()
        self._sizes: dict[str, int] = {}

    @property
    def keep_all(self) -> bool:
        """Whether nothing is forgotten."""
        return math.isinf(self.keep_bytes)

    def load(self, database: Database, after: int) -> None:
        """Find what the committed rows after ``after`` name."""
        self._named.clear()
        self._sizes.clear()
        for row in read_rows(database, after=after):
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

    def starts(self, seqs: Sequence[int]) -> set[int]:
        """Return which of some checkpoints are worth keeping as the beginning of a replay.

        The oldest within ``keep_bytes``, and one every half of that, so that when the oldest is too
        far back the next one is not near.

        Args:
            seqs: the last row that each covers, ascending.
        """
        kept: set[int] = set()
        last = math.inf
        if self.keep_bytes == 0:
            return kept
        for seq in seqs:
            size = self._bytes_after(seq)
            if size <= self.keep_bytes and (not kept or last - size > self.keep_bytes / 2):
                kept.add(seq)
                last = size
        return kept

    def needed(self, after: int) -> set[str]:
        """Return the checksums that rows after ``after`` name, and forget the others."""
        while self._named and self._named[0][0] <= after:
            self._named.popleft()
        found = {checksum for _, checksum in self._named}
        self._sizes = {one: size for one, size in self._sizes.items() if one in found}
        return found

    def _bytes_after(self, seq: int) -> int:
        found = {checksum for named, checksum in self._named if named > seq}
        return sum(self._sizes[checksum] for checksum in found)

    def _note(self, seq: int, checksum: str) -> None:
        self._named.append((seq, checksum))
        if checksum not in self._sizes:
            self._sizes[checksum] = self.blobs.size_bytes(checksum)

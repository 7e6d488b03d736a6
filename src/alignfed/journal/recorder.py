"""Rows together with what a replay needs beside them: uploads, new versions, calibrator's answers.

Files first, then the rows that name them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from alignfed.core.coordinator import Coordinator
from alignfed.core.events import Event, UpdateArrived
from alignfed.core.instructions import Instruction, Publish
from alignfed.journal.answers import ANSWERS_NOTE, RecordingCalibrator
from alignfed.journal.blobs import BlobStore
from alignfed.journal.payloads import Payloads
from alignfed.journal.store import SqliteJournal


class Recorder:
    """Puts events into a journal so that they can be handled again.

    Attributes:
        payloads: what is kept for that; checkpoints are to know it.
    """

    def __init__(self, journal: SqliteJournal, *, keep_bytes: int = 0) -> None:
        """Record into ``journal``.

        Args:
            journal: takes the rows, and says whether all payloads are kept.
            keep_bytes: else, how much to keep beyond what recovery needs.
        """
        self._journal = journal
        blobs = BlobStore(journal.directory.checkpoints)
        self.payloads = Payloads(
            blobs, keep_bytes=math.inf if journal.keeps_payloads else keep_bytes
        )
        self._calibrator: RecordingCalibrator | None = None

    def observe(self, coordinator: Coordinator) -> Coordinator:
        """Return the coordinator to use: what its calibrator answers is recorded."""
        if coordinator.calibrator is None:
            return coordinator
        keep = self._keep if self.payloads.keep_all else None
        self._calibrator = RecordingCalibrator(coordinator.calibrator, keep)
        return replace(coordinator, calibrator=self._calibrator)

    def record(self, event: Event, instructions: Sequence[Instruction]) -> None:
        """Append an event, the instructions it led to, and what both refer to.

        Raises:
            JournalError: the journal takes no rows, an unknown type, or the disk is full.
        """
        journal, payloads = self._journal, self.payloads
        payload = None
        if isinstance(event, UpdateArrived):
            payload = payloads.keep_adapter(journal.seq + 1, event.update.adapter)
        for seq, instruction in enumerate(instructions, journal.seq + 2):
            if isinstance(instruction, Publish):
                payloads.keep_adapter(seq, instruction.adapter)
        journal.record(event, instructions, payload=payload)
        if self._calibrator is not None and (answers := self._calibrator.take()):
            journal.record_note(event.time_s, ANSWERS_NOTE, {"answers": answers})

    def _keep(self, tensor: Tensor) -> str:
        # The event is not recorded yet; what it keeps must outlive the checkpoint before it.
        return self.payloads.keep_tensor(self._journal.seq + 1, tensor)

"""``metrics.jsonl``: the journal's versions and evaluations as lines for people and plotting tools.

The journal is the truth: a line is added after its rows are committed, and the file is rewritten
from the tables whenever a run is resumed, so the two cannot disagree for long.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import IO

from alignfed.journal.atomic import disk_errors, write_text_atomically


class MetricsLog:
    """The file, open for appending."""

    def __init__(self, path: Path) -> None:
        """Append to ``path``; it is opened with the first line."""
        self._path = path
        self._file: IO[str] | None = None

    def append(self, lines: Iterable[str]) -> None:
        """Add lines and hand them to the operating system.

        Raises:
            JournalError: the file cannot be written.
        """
        text = "".join(f"{line}\n" for line in lines)
        if not text:
            return
        with disk_errors(self._path):
            if self._file is None:
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(text)
            self._file.flush()

    def rewrite(self, lines: Iterable[str]) -> None:
        """Replace the whole file in one step.

        Raises:
            JournalError: the file cannot be written.
        """
        self.close()
        write_text_atomically(self._path, "".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Close the file; a later line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

"""Tables derived from rows as they are recorded: uploads and their fate, versions, evaluations."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

from alignfed.core.events import EvaluationFinished
from alignfed.core.instructions import Publish, Reject
from alignfed.core.update import Update
from alignfed.errors import JournalError
from alignfed.journal.database import Database
from alignfed.journal.rows import Fields, encode_mapping, integer, text

_UPLOAD = f"INSERT INTO uploads VALUES ({','.join('?' * 14)})"
_OUTCOME_AT = 6
"""Where the outcome begins among an upload's columns; the rest belongs to it."""
_OUTCOME = (
    "UPDATE uploads SET outcome=?, outcome_seq=?, reason=?, detail=?, applied_version=?,"
    " staleness=?, weight=?, norm=? WHERE seq=?"
)
_VERSION = f"INSERT INTO versions VALUES ({','.join('?' * 10)})"
_EVALUATION = f"INSERT INTO evaluations VALUES ({','.join('?' * 5)})"


class DerivedTables:
    """What waits to be written to the derived tables, and which uploads wait in the buffer."""

    def __init__(self, buffered: dict[int, int]) -> None:
        """Begin with the ``seq`` of each upload in the coordinator's buffer, by task id."""
        self._buffered = buffered
        self._uploads: dict[int, tuple[Any, ...]] = {}
        self._outcomes: list[tuple[Any, ...]] = []
        self._versions: list[tuple[Any, ...]] = []
        self._evaluations: list[tuple[Any, ...]] = []
        self._lines: list[str] = []

    def arrived(
        self,
        seq: int,
        time_s: float,
        update: Update,
        fields: Fields,
        refused: tuple[int, Reject] | None,
    ) -> None:
        """Note an upload.

        Args:
            seq: number of its row.
            time_s: when it arrived.
            update: the upload.
            fields: what its row holds.
            refused: the row and the instruction that refused it, if any.
        """
        _, client_id, task_id, version, _ = fields
        told = (seq, task_id, client_id, version, time_s, integer(update.num_examples))
        if refused is None:
            self._buffered[update.task_id] = seq
            self._uploads[seq] = (*told, "buffered", seq, None, None, None, None, None, None)
        else:
            self._uploads[seq] = (*told, *_refusal(*refused), None, None, None, None)

    def rejected(self, seq: int, time_s: float, reject: Reject) -> None:
        """Note a refusal of something of which the driver could not even make an update."""
        self._uploads[seq] = (
            *(seq, integer(reject.task_id), integer(reject.client_id), None, time_s, None),
            *_refusal(seq, reject),
            *(None, None, None, None),
        )

    def published(self, seq: int, time_s: float, publish: Publish) -> None:
        """Note a new server version and the uploads it applied.

        Raises:
            JournalError: it applies an upload that never arrived, or was applied before.
        """
        applied, version = publish.applied, publish.version
        uploads, buffered = self._uploads, self._buffered
        for item in applied:
            upload_seq = buffered.pop(item.task_id, None)
            if upload_seq is None:
                raise JournalError(
                    f"version {version} applies task {item.task_id}, of which this journal"
                    " has no upload waiting; the coordinator's state and the journal are not of"
                    " one run",
                    task_id=item.task_id,
                )
            weight, norm = _finite(item.weight), _finite(item.norm)
            reason = detail = None
            if item.cut < 1.0:
                reason = "cut"
                detail = f"coefficient multiplied by {item.cut:.3g}, see the version's notes"
            outcome = ("applied", seq, reason, detail, version, item.staleness, weight, norm)
            if (waiting := uploads.get(upload_seq)) is not None:
                uploads[upload_seq] = waiting[:_OUTCOME_AT] + outcome
            else:
                self._outcomes.append((*outcome, upload_seq))
        staleness = [item.staleness for item in applied]
        row = (
            *(seq, version, time_s + 0.0, publish.adapter.checksum, len(applied)),
            sum(staleness) / len(staleness) if staleness else None,
            max(staleness, default=None),
            *(publish.work.bytes_moved, publish.work.calibration_tokens),
            encode_mapping(publish.notes),
        )
        self._versions.append(row)
        self._lines.append(_version_line(row))

    def evaluated(self, seq: int, event: EvaluationFinished) -> None:
        """Note a score on the common evaluation set."""
        score = None if event.score is None else _finite(event.score)
        row = (seq, event.time_s + 0.0, event.version, _finite(event.loss), score)
        self._evaluations.append(row)
        self._lines.append(_evaluation_line(row))

    def write(self, connection: sqlite3.Connection) -> None:
        """Put what waits into the transaction that is open."""
        connection.executemany(_UPLOAD, self._uploads.values())
        connection.executemany(_OUTCOME, self._outcomes)
        connection.executemany(_VERSION, self._versions)
        connection.executemany(_EVALUATION, self._evaluations)

    def clear(self) -> list[str]:
        """Forget what was written; return its lines for ``metrics.jsonl``."""
        lines, self._lines = self._lines, []
        self._uploads.clear()
        for waiting in (self._outcomes, self._versions, self._evaluations):
            waiting.clear()
        return lines


def cut(connection: sqlite3.Connection, seq: int) -> None:
    """Take back everything after ``seq``, within the transaction that is open."""
    connection.execute(
        "INSERT OR REPLACE INTO undone"
        " SELECT seq, time_s, kind, name, client_id, task_id, version, body FROM rows"
        " WHERE seq > ? AND kind IN ('cohort', 'note')",
        (seq,),
    )
    connection.execute("DELETE FROM rows WHERE seq > ?", (seq,))
    connection.execute("DELETE FROM uploads WHERE seq > ?", (seq,))
    connection.execute(
        "UPDATE uploads SET outcome='buffered', outcome_seq=seq, reason=NULL, detail=NULL,"
        " applied_version=NULL, staleness=NULL, weight=NULL, norm=NULL WHERE outcome_seq > ?",
        (seq,),
    )
    connection.execute("DELETE FROM versions WHERE seq > ?", (seq,))
    connection.execute("DELETE FROM evaluations WHERE seq > ?", (seq,))


def load(database: Database) -> DerivedTables:
    """Return the derived tables as the journal left them."""
    query = "SELECT task_id, seq FROM uploads WHERE outcome = 'buffered' ORDER BY seq"
    return DerivedTables(dict(database.query(query)))


def metrics_lines(database: Database) -> Iterator[str]:
    """Yield every line of ``metrics.jsonl``, as it was when first written."""
    found = [
        (row[0], _version_line(row))
        for row in database.query("SELECT * FROM versions ORDER BY seq")
    ]
    found.extend(
        (row[0], _evaluation_line(row))
        for row in database.query("SELECT * FROM evaluations ORDER BY seq")
    )
    return (line for _, line in sorted(found))


def find_refusal(
    update: Update, derives: Sequence[tuple[int, Publish | Reject]]
) -> tuple[int, Reject] | None:
    """Return the row and the instruction that refuse the upload just arrived, if any do."""
    for number, instruction in derives:
        if (
            isinstance(instruction, Reject)
            and instruction.task_id == update.task_id
            and instruction.client_id == update.client_id
        ):
            return number, instruction
    return None


def _refusal(seq: int, reject: Reject) -> tuple[Any, ...]:
    return ("rejected", seq, reject.reason.value, text(reject.detail))


def _finite(value: float) -> float | None:
    # Adding zero turns -0.0, which SQLite does not keep, into 0.0.
    return value + 0.0 if math.isfinite(value) else None


def _version_line(row: tuple[Any, ...]) -> str:
    seq, version, time_s, _, uploads, staleness_mean, staleness_max, _, _, notes = row
    head = {
        "kind": "version",
        "seq": seq,
        "time_s": time_s,
        "version": version,
        "uploads": uploads,
        "staleness_mean": staleness_mean,
        "staleness_max": staleness_max,
    }
    return f'{json.dumps(head)[:-1]}, "notes": {notes}}}'


def _evaluation_line(row: tuple[Any, ...]) -> str:
    seq, time_s, version, loss, score = row
    return json.dumps(
        {
            "kind": "evaluation",
            "seq": seq,
            "time_s": time_s,
            "version": version,
            "loss": loss,
            "score": score,
        }
    )

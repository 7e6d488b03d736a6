"""Read-only access to a run's journal, for reports and status; works while the run is writing.

Only committed rows are seen. Each method reads one consistent state of the journal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignfed.errors import JournalError
from alignfed.journal.database import Database
from alignfed.journal.directory import RunDirectory
from alignfed.journal.rows import Row
from alignfed.journal.schema import read_meta


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """One upload and what became of it.

    Attributes:
        seq: the row with which it arrived.
        task_id: the task it claims to answer; None where it was not a number.
        client_id: who it claims to be from; None likewise.
        base_version: the version it claims to start from; None where unknown.
        arrived_s: the driver's clock.
        num_examples: training examples it claims; None where unknown.
        outcome: ``buffered``, ``applied`` or ``rejected``.
        reason: why it was refused, a ``RejectReason``'s value; ``cut`` where it was applied with a
            coefficient cut for being too long or for contradicting the others.
        detail: the same for people.
        applied_version: the version whose flush applied it.
        staleness: server versions passed since its base when it was applied.
        weight: its coefficient in the server step.
        norm: Euclidean norm of its innovation.
        metrics: what the client reported.
    """

    seq: int
    task_id: int | None
    client_id: int | None
    base_version: int | None
    arrived_s: float
    num_examples: int | None
    outcome: str
    reason: str | None
    detail: str | None
    applied_version: int | None
    staleness: int | None
    weight: float | None
    norm: float | None
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SenderRecord:
    """What became of everything that claims to be from one client.

    Attributes:
        client_id: who it claims to be from; None where that was not a number.
        uploads: how many there were.
        refused: how many of them were refused.
        cut: how many were applied with a coefficient cut (``UploadRecord.reason``).
        reasons: why any were refused, in alphabetical order.
        pull: mean over those applied of ``|weight| x norm``, how far each moved the server; None:
            none was.
    """

    client_id: int | None
    uploads: int
    refused: int
    cut: int
    reasons: tuple[str, ...]
    pull: float | None


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One published server version."""

    seq: int
    version: int
    time_s: float
    adapter: str
    uploads: int
    staleness_mean: float | None
    staleness_max: int | None
    bytes_moved: int
    calibration_tokens: int
    notes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One score on the common evaluation set; a loss that was not finite is None."""

    seq: int
    time_s: float
    version: int
    loss: float | None
    score: float | None


class RunReader:
    """A run's journal, opened for reading."""

    def __init__(self, root: Path) -> None:
        """Open the journal in a run's directory.

        Raises:
            JournalError: there is none, it is damaged or of another format.
        """
        self.directory = RunDirectory(root)
        path = self.directory.journal
        if not path.exists():
            raise JournalError(
                f"{root} holds no run: {path.name} is missing; check the path", path=str(root)
            )
        self.database = Database(path, writable=False)
        try:
            self.meta = read_meta(self.database)
        except JournalError:
            self.database.close()
            raise

    def close(self) -> None:
        """Close the journal."""
        self.database.close()

    def __enter__(self) -> RunReader:
        """Return itself; the block's end closes it."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def rows(self, *, after: int = 0, name: str | None = None) -> Iterator[Row]:
        """Yield the journal's rows in order.

        Args:
            after: only rows with a greater ``seq``; to follow a run that is being written.
            name: only events or instructions of this type, or notes of this name.
        """
        for *columns, body in self.database.query(
            "SELECT seq, time_s, kind, name, client_id, task_id, version, body FROM rows"
            " WHERE seq > ? AND (? IS NULL OR name = ?) ORDER BY seq",
            (after, name, name),
        ):
            yield Row(*(*columns, json.loads(body)))

    def uploads(self, outcome: str | None = None) -> Iterator[UploadRecord]:
        """Yield uploads in order of arrival, of one outcome or all."""
        for *columns, body in self.database.query(
            "SELECT u.seq, u.task_id, u.client_id, base_version, arrived_s, num_examples, outcome,"
            " reason, detail, applied_version, staleness, weight, norm, body"
            " FROM uploads AS u JOIN rows AS r ON r.seq = u.seq"
            " WHERE ? IS NULL OR outcome = ? ORDER BY u.seq",
            (outcome, outcome),
        ):
            yield UploadRecord(*(*columns, json.loads(body).get("metrics", {})))

    def senders(self) -> Iterator[SenderRecord]:
        """Yield what became of each client's uploads, most often refused or cut first."""
        for client_id, uploads, refused, cut, reasons, pull in self.database.query(
            "SELECT client_id, COUNT(*), SUM(outcome = 'rejected'),"
            " SUM(outcome = 'applied' AND reason IS NOT NULL) AS cut,"
            " GROUP_CONCAT(DISTINCT CASE WHEN outcome = 'rejected' THEN reason END),"
            " AVG(CASE WHEN outcome = 'applied' THEN ABS(weight) * norm END) AS pull"
            " FROM uploads GROUP BY client_id"
            " ORDER BY SUM(reason IS NOT NULL) DESC, pull, client_id"
        ):
            found = tuple(sorted(reasons.split(","))) if reasons else ()
            yield SenderRecord(client_id, uploads, refused, cut, found, pull)

    def versions(self) -> Iterator[VersionRecord]:
        """Yield published versions in order."""
        for *columns, notes in self.database.query("SELECT * FROM versions ORDER BY seq"):
            yield VersionRecord(*(*columns, json.loads(notes)))

    def evaluations(self) -> Iterator[EvaluationRecord]:
        """Yield evaluations in order."""
        for row in self.database.query("SELECT * FROM evaluations ORDER BY seq"):
            yield EvaluationRecord(*row)

    def cohorts(self) -> Iterator[tuple[int, ...]]:
        """Yield the task ids that were computed together, in order; none, where each was alone."""
        return (tuple(row.body["task_ids"]) for row in self.rows(name="Cohort"))

    def staleness_histogram(self) -> dict[int, int]:
        """Return applied uploads by staleness, least stale first."""
        return dict(
            self.database.query(
                "SELECT staleness, COUNT(*) FROM uploads WHERE outcome = 'applied'"
                " GROUP BY staleness ORDER BY staleness"
            )
        )

    def participation(self) -> dict[int, int]:
        """Return accepted uploads of every client that ever joined, by client id; also zeros."""
        return dict(
            self.database.query(
                "SELECT joined.client_id, COUNT(uploads.seq) FROM"
                " (SELECT DISTINCT client_id FROM rows WHERE name = 'ClientJoined') AS joined"
                " LEFT JOIN (SELECT seq, client_id FROM uploads WHERE outcome != 'rejected')"
                " AS uploads ON uploads.client_id = joined.client_id"
                " GROUP BY joined.client_id ORDER BY joined.client_id"
            )
        )

    def rejections(self) -> dict[str, int]:
        """Return refused uploads by reason, in alphabetical order."""
        return dict(
            self.database.query(
                "SELECT reason, COUNT(*) FROM uploads WHERE outcome = 'rejected'"
                " GROUP BY reason ORDER BY reason"
            )
        )

    def outcomes(self) -> dict[str, int]:
        """Return uploads by outcome, in alphabetical order."""
        return dict(
            self.database.query(
                "SELECT outcome, COUNT(*) FROM uploads GROUP BY outcome ORDER BY outcome"
            )
        )

    def last(self) -> tuple[int, float]:
        """Return the last committed row's ``(seq, time_s)``; ``(0, 0.0)`` before the first."""
        found = list(self.database.query("SELECT seq, time_s FROM rows ORDER BY seq DESC LIMIT 1"))
        return found[0] if found else (0, 0.0)

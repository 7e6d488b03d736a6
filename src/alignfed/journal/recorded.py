"""Rows read back as what they were: events, whose uploads come from the files kept beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alignfed.core.adapter import Adapter
from alignfed.core.events import (
    ClientJoined,
    ClientLeft,
    EvaluationFinished,
    Event,
    RunStarted,
    TaskFailed,
    TimerFired,
    UpdateArrived,
    UploadRefused,
)
from alignfed.core.reasons import RejectReason
from alignfed.core.update import Update
from alignfed.errors import JournalError
from alignfed.journal.answers import ANSWERS_NOTE, Answer
from alignfed.journal.database import DamagedError, Database
from alignfed.journal.rows import Row

_PIECE = 1_000

NOT_FINITE = frozenset({"nan", "inf", "-inf"})
"""How a float that JSON cannot hold is written."""


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """An event and what it led to.

    Attributes:
        row: the event's row.
        instructions: the rows of its instructions, in order.
        answers: what the calibrator answered meanwhile.
        last_seq: the last of these rows.
    """

    row: Row
    instructions: tuple[Row, ...]
    answers: tuple[Answer, ...]
    last_seq: int


def read_rows(database: Database, *, after: int = 0) -> Iterator[Row]:
    """Yield committed rows after ``after`` in order, a piece at a time.

    Nothing is held open between the pieces: the journal may be cut, closed or written meanwhile.

    Raises:
        JournalError: the file is damaged.
    """
    while True:
        piece = list(
            database.query(
                "SELECT seq, time_s, kind, name, client_id, task_id, version, body FROM rows"
                " WHERE seq > ? ORDER BY seq LIMIT ?",
                (after, _PIECE),
            )
        )
        for *columns, body in piece:
            after = columns[0]
            try:
                yield Row(*(*columns, json.loads(body)))
            except ValueError as error:
                raise DamagedError(
                    f"row {after} of {database.path} is damaged: {error}; restore the run's"
                    " directory from a backup",
                    path=str(database.path),
                ) from error
        if len(piece) < _PIECE:
            return


def recorded_events(rows: Iterable[Row]) -> Iterator[RecordedEvent]:
    """Yield rows grouped by their events; cohorts, refusals and other notes are left out."""
    event: Row | None = None
    instructions: list[Row] = []
    answers: list[Answer] = []
    last_seq = 0
    for row in rows:
        if row.kind == "event":
            if event is not None:
                yield RecordedEvent(event, tuple(instructions), tuple(answers), last_seq)
            event, instructions, answers = row, [], []
        elif row.kind == "instruction":
            instructions.append(row)
        elif row.name == ANSWERS_NOTE:
            answers.extend(row.body["answers"])
        last_seq = row.seq
    if event is not None:
        yield RecordedEvent(event, tuple(instructions), tuple(answers), last_seq)


def decode_event(row: Row, adapter: Callable[[str], Adapter]) -> Event:
    """Return the event of a row.

    Args:
        row: an event's row.
        adapter: reads an adapter by its checksum.

    Raises:
        DamagedError: the upload is missing or damaged.
        JournalError: it was not kept, or the row is of an unknown kind.
    """
    decode = _DECODERS.get(row.name)
    if decode is None:
        raise JournalError(
            f"row {row.seq} is a {row.name}, which this version of AlignFed does not know; use the"
            " version that wrote it",
            seq=row.seq,
        )
    try:
        return decode(row, adapter)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(
            f"row {row.seq} ({row.name}) is damaged: {error!r}; restore the run's directory from a"
            " backup",
            seq=row.seq,
        ) from error


def _update_arrived(row: Row, adapter: Callable[[str], Adapter]) -> UpdateArrived:
    body = row.body
    if "adapter" not in body:
        raise JournalError(
            f"the upload of row {row.seq} (task {row.task_id} of client {row.client_id}) was not"
            " kept, so what follows cannot be handled again; keep uploads from the start with"
            " --keep-payloads",
            seq=row.seq,
        )
    claims: Mapping[str, Any] = body.get("claims") or {
        "task_id": row.task_id,
        "client_id": row.client_id,
        "base_version": row.version,
        "num_examples": body["num_examples"],
    }
    metrics = {name: _number(value) for name, value in body["metrics"].items()}
    return UpdateArrived(
        row.time_s,
        Update(
            **{name: _number(value) for name, value in claims.items()},
            adapter=adapter(body["adapter"]),
            metrics=metrics,
        ),
    )


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in NOT_FINITE else value


def _evaluation_finished(row: Row, adapter: Callable[[str], Adapter]) -> EvaluationFinished:
    assert row.version is not None
    loss, score = _number(row.body["loss"]), _number(row.body["score"])
    return EvaluationFinished(row.time_s, row.version, loss, score)


def _client_joined(row: Row, adapter: Callable[[str], Adapter]) -> ClientJoined:
    return ClientJoined(row.time_s, _client(row), _number(row.body.get("step_s")))


def _client(row: Row) -> int:
    if row.client_id is None:
        raise ValueError("it names no client")
    return row.client_id


def _task_failed(row: Row, adapter: Callable[[str], Adapter]) -> TaskFailed:
    if row.task_id is None:
        raise ValueError("it names no task")
    return TaskFailed(row.time_s, row.task_id, _client(row), row.body["reason"])


def _upload_refused(row: Row, adapter: Callable[[str], Adapter]) -> UploadRefused:
    if row.task_id is None:
        raise ValueError("it names no task")
    reason = RejectReason(row.body["reason"])
    return UploadRefused(row.time_s, row.task_id, _client(row), reason, row.body["detail"])


_DECODERS: dict[str, Callable[[Row, Callable[[str], Adapter]], Event]] = {
    "RunStarted": lambda row, adapter: RunStarted(row.time_s),
    "ClientJoined": _client_joined,
    "ClientLeft": lambda row, adapter: ClientLeft(row.time_s, _client(row)),
    "UpdateArrived": _update_arrived,
    "TaskFailed": _task_failed,
    "UploadRefused": _upload_refused,
    "TimerFired": lambda row, adapter: TimerFired(row.time_s),
    "EvaluationFinished": _evaluation_finished,
}

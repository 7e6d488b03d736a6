"""Events and instructions as the journal's rows, each written by hand: this is the hot path.

A row says who, which task and which version in columns, and the rest in a compact JSON body.
Adapters are not in rows, only their checksums. A value JSON or SQLite cannot hold (only a hostile
upload has one) is written as text.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

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
from alignfed.core.instructions import (
    AppliedUpload,
    Dispatch,
    Evaluate,
    Instruction,
    Publish,
    Reject,
    SetTimer,
    Stop,
)
from alignfed.core.update import Update
from alignfed.errors import JournalError

Fields: TypeAlias = "tuple[str, int | None, int | None, int | None, str]"
"""A row's name, client id, task id, version and body."""

_MAX_INTEGER = 2**63 - 1
_MAX_TEXT = 500
_encode_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_encode_key = lru_cache(maxsize=256)(_encode_json)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the journal.

    Attributes:
        seq: position in the run, from 1 without a gap.
        time_s: the driver's clock.
        kind: ``event``, ``instruction``, ``cohort`` or ``note``.
        name: the event's or instruction's type, or the note's name.
        client_id: whom it concerns, if anyone.
        task_id: which task it concerns, if any.
        version: the server version it concerns: an upload's base, a publish's result.
        body: everything else.
    """

    seq: int
    time_s: float
    kind: str
    name: str
    client_id: int | None
    task_id: int | None
    version: int | None
    body: Mapping[str, Any]


def encode_event(event: Event) -> Fields:
    """Return the row of an event.

    Raises:
        JournalError: an event of unknown type.
    """
    encode = _ENCODERS.get(type(event))
    if encode is None:
        raise JournalError(f"the journal cannot record a {type(event).__name__}")
    return encode(event)


def encode_upload(update: Update, checksum: str | None) -> Fields:
    """Return the row of an upload; it names the adapter by its checksum, where that is given."""
    metrics = encode_mapping(update.metrics)
    client_id, task_id = integer(update.client_id), integer(update.task_id)
    version, examples = integer(update.base_version), integer(update.num_examples)
    if client_id is None or task_id is None or version is None or examples is None:
        claims = {
            name: _plain(getattr(update, name))
            for name in ("client_id", "task_id", "base_version", "num_examples")
        }
        told = f'"claims":{_encode_json(claims)}'
    else:
        told = f'"num_examples":{examples}'
    adapter = "" if checksum is None else f',"adapter":"{checksum}"'
    return (
        "UpdateArrived", client_id, task_id, version, f'{{{told},"metrics":{metrics}{adapter}}}'
    )  # fmt: skip


def encode_instruction(instruction: Instruction) -> Fields:
    """Return the row of an instruction.

    Raises:
        JournalError: an instruction of unknown type.
    """
    encode = _ENCODERS.get(type(instruction))
    if encode is None:
        raise JournalError(f"the journal cannot record a {type(instruction).__name__}")
    return encode(instruction)


def encode_cohort(task_ids: Sequence[int]) -> Fields:
    """Return the row of tasks that were computed together."""
    numbers = ",".join(map(str, task_ids))
    return ("Cohort", None, None, None, f'{{"task_ids":[{numbers}]}}')


def encode_mapping(mapping: Mapping[str, Any]) -> str:
    """Return a JSON object; what JSON cannot hold becomes text."""
    if not mapping:
        return "{}"
    parts = []
    for key, value in mapping.items():
        # What a client reports is nearly always this; written as the encoder below would write it.
        if type(key) is not str or type(value) is not float or value - value != 0.0:
            break
        parts.append(f"{_encode_key(key)}:{value!r}")
    else:
        return f"{{{','.join(parts)}}}"
    try:
        return _encode_json(dict(mapping))
    except (TypeError, ValueError, RecursionError):
        return _encode_json({text(key): _plain(value) for key, value in mapping.items()})


def integer(value: object) -> int | None:
    """Return a whole number that fits a column, or None for anything else."""
    if type(value) is int and -_MAX_INTEGER - 1 <= value <= _MAX_INTEGER:
        return value
    return None


def text(value: object) -> str:
    """Return text that fits a column: valid Unicode of bounded length."""
    found = value if isinstance(value, str) else reprlib.repr(value)
    return found[:_MAX_TEXT].encode("utf-8", "backslashreplace").decode()


def _plain(value: object) -> object:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, bool) or integer(value) is not None:
        return value
    return text(value)


def _number(value: float) -> str:
    """JSON of a float; infinity and NaN are text, because JSON has no such numbers."""
    if type(value) is not float:
        value = float(value)
    return repr(value) if value - value == 0.0 else f'"{value!r}"'


def _evaluation_finished(event: EvaluationFinished) -> Fields:
    score = "null" if event.score is None else _number(event.score)
    body = f'{{"loss":{_number(event.loss)},"score":{score}}}'
    return ("EvaluationFinished", None, None, event.version, body)


def _upload_refused(event: UploadRefused) -> Fields:
    body = f'{{"reason":"{event.reason.value}","detail":{_encode_json(text(event.detail))}}}'
    return ("UploadRefused", integer(event.client_id), integer(event.task_id), None, body)


def _task_failed(event: TaskFailed) -> Fields:
    body = f'{{"reason":{_encode_json(text(event.reason))}}}'
    return ("TaskFailed", event.client_id, event.task_id, None, body)


def _dispatch(instruction: Dispatch) -> Fields:
    task = instruction.task
    steps = "" if task.steps is None else f',"steps":{task.steps}'
    body = f'{{"dispatch":{task.dispatch},"deadline_s":{_number(task.deadline_s)}{steps}}}'
    return ("Dispatch", task.client_id, task.task_id, task.base_version, body)


def _reject(instruction: Reject) -> Fields:
    body = _encode_json({"reason": instruction.reason.value, "detail": text(instruction.detail)})
    return (
        "Reject", integer(instruction.client_id), integer(instruction.task_id), None, body
    )  # fmt: skip


def _publish(instruction: Publish) -> Fields:
    applied = ",".join([_applied(item) for item in instruction.applied])
    work = instruction.work
    body = (
        f'{{"adapter":"{instruction.adapter.checksum}","applied":[{applied}],'
        f'"notes":{encode_mapping(instruction.notes)},"bytes_moved":{work.bytes_moved},'
        f'"calibration_tokens":{work.calibration_tokens}}}'
    )
    return ("Publish", None, None, instruction.version, body)


def _applied(item: AppliedUpload) -> str:
    weight, norm = item.weight, item.norm
    if type(weight) is type(norm) is float and weight - weight == norm - norm == 0.0:
        numbers = f"{weight!r},{norm!r}"  # as _number writes them
    else:
        numbers = f"{_number(weight)},{_number(norm)}"
    if item.cut < 1.0:
        numbers += f",{_number(item.cut)}"
    return f"[{item.task_id},{item.client_id},{item.base_version},{item.staleness},{numbers}]"


def _client_joined(event: ClientJoined) -> Fields:
    body = "{}" if event.step_s is None else f'{{"step_s":{_number(event.step_s)}}}'
    return ("ClientJoined", event.client_id, None, None, body)


def _set_timer(instruction: SetTimer) -> Fields:
    return ("SetTimer", None, None, None, f'{{"at_s":{_number(instruction.at_s)}}}')


def _stop(instruction: Stop) -> Fields:
    body = f'{{"reason":"{instruction.reason.value}"}}'
    return ("Stop", None, None, instruction.version, body)


_ENCODERS: dict[type, Callable[[Any], Fields]] = {
    RunStarted: lambda event: ("RunStarted", None, None, None, "{}"),
    ClientJoined: _client_joined,
    ClientLeft: lambda event: ("ClientLeft", event.client_id, None, None, "{}"),
    UpdateArrived: lambda event: encode_upload(event.update, None),
    TaskFailed: _task_failed,
    UploadRefused: _upload_refused,
    TimerFired: lambda event: ("TimerFired", None, None, None, "{}"),
    EvaluationFinished: _evaluation_finished,
    Dispatch: _dispatch,
    Reject: _reject,
    Publish: _publish,
    Evaluate: lambda item: ("Evaluate", None, None, item.version, "{}"),
    SetTimer: _set_timer,
    Stop: _stop,
}

"""Recorded events handled again, and what they lead to held against the record.

Two instructions are equal where their rows are: the adapters of server versions by checksum, every
weight, norm and note to the last bit. On another platform sums end in other bits; then numbers
are compared to a tolerance, and adapters by their distance where the recorded ones were kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from alignfed.core.adapter import Adapter, norm
from alignfed.core.coordinator import Coordinator
from alignfed.core.distance import distance
from alignfed.core.events import Event
from alignfed.core.instructions import Instruction, Publish
from alignfed.core.state import CoordinatorState
from alignfed.errors import AdapterError, CoordinatorError, RuleError
from alignfed.journal.answers import OtherQuestionError, RecordedCalibrator
from alignfed.journal.database import DamagedError
from alignfed.journal.recorded import RecordedEvent, decode_event
from alignfed.journal.rows import Row, encode_instruction

_COMPARED = ("name", "client_id", "task_id", "version", "body")

_DIVERGED = (OtherQuestionError, AdapterError, CoordinatorError, RuleError)
"""What the coordinator did not raise when the event was first handled."""

ReadAdapter = Callable[[str], Adapter]
"""Reads an adapter by its checksum."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first thing a replay does differently.

    Attributes:
        event: the event it was handling.
        position: which of the event's instructions, from 0; None where it is none of them.
        expected: the recorded instruction; None where the record has no more.
        came: the replay's; None where it has no more.
        difference: what is different, in words.
    """

    event: Row
    position: int | None
    expected: Row | None
    came: Row | None
    difference: str


@dataclass(frozen=True, slots=True)
class Rehandled:
    """One event handled again.

    Attributes:
        recorded: what is on record.
        event: the event.
        instructions: what it led to now.
        state: the coordinator's state after it.
        exact: whether all instructions are those on record to the bit.
        divergence: what is different beyond the tolerance, if anything.
    """

    recorded: RecordedEvent
    event: Event
    instructions: tuple[Instruction, ...]
    state: CoordinatorState
    exact: bool
    divergence: Divergence | None


def rehandle(
    coordinator: Coordinator,
    state: CoordinatorState,
    events: Iterable[RecordedEvent],
    read_adapter: ReadAdapter,
    *,
    tolerance: float,
) -> Iterator[Rehandled]:
    """Handle events in order and compare; stop after the first divergence.

    Args:
        coordinator: as the recipe makes it, with a ``RecordedCalibrator`` if with any.
        state: before the first of ``events``; it is changed.
        events: what is on record.
        read_adapter: reads uploads and published adapters.
        tolerance: largest relative difference of numbers and adapters; 0 for equal bits.

    Raises:
        DamagedError: an upload is missing or damaged; what came before it was yielded.
        JournalError: an upload was not kept.
    """
    calibrator = coordinator.calibrator
    for recorded in events:
        event = decode_event(recorded.row, read_adapter)
        if isinstance(calibrator, RecordedCalibrator):
            calibrator.expect(recorded.answers)
        try:
            state, instructions = coordinator.handle(state, event)
            if isinstance(calibrator, RecordedCalibrator):
                calibrator.refuse_rest()
        except _DIVERGED as error:
            raised = Divergence(recorded.row, None, None, None, str(error))
            yield Rehandled(recorded, event, (), state, False, raised)
            return
        exact, divergence = _compare(recorded, instructions, read_adapter, tolerance)
        yield Rehandled(recorded, event, tuple(instructions), state, exact, divergence)
        if divergence is not None:
            return


def _compare(
    recorded: RecordedEvent,
    instructions: Sequence[Instruction],
    read_adapter: ReadAdapter,
    tolerance: float,
) -> tuple[bool, Divergence | None]:
    exact = True
    pairs = zip_longest(recorded.instructions, instructions)
    for position, (expected, instruction) in enumerate(pairs):
        came = None if instruction is None else _row(recorded.row, position, instruction)
        if expected is not None and came is not None and _same(expected, came):
            continue
        exact = False
        if expected is None or came is None:
            more, less = ("replay", "record") if expected is None else ("record", "replay")
            difference = f"the {more} has an instruction here, the {less} has none"
        else:
            found = _difference(expected, came, instruction, read_adapter, tolerance)
            if found is None:
                continue
            difference = found
        return False, Divergence(recorded.row, position, expected, came, difference)
    return exact, None


def _row(event: Row, position: int, instruction: Instruction) -> Row:
    name, client_id, task_id, version, body = encode_instruction(instruction)
    seq = event.seq + 1 + position
    return Row(
        seq, event.time_s, "instruction", name, client_id, task_id, version, json.loads(body)
    )


def _same(expected: Row, came: Row) -> bool:
    return all(getattr(expected, name) == getattr(came, name) for name in _COMPARED)


def _difference(
    expected: Row,
    came: Row,
    instruction: Instruction | None,
    read_adapter: ReadAdapter,
    tolerance: float,
) -> str | None:
    """Return the first difference beyond the tolerance in words, or None."""
    for name in _COMPARED[:-1]:
        if (wanted := getattr(expected, name)) != (found := getattr(came, name)):
            return f"{name} is {found}, on record {wanted}"
    keys = [*expected.body, *(key for key in came.body if key not in expected.body)]
    for key in keys:
        wanted, found = expected.body.get(key), came.body.get(key)
        if wanted == found:
            continue
        if key == "adapter" and isinstance(instruction, Publish):
            problem = _adapter_difference(str(wanted), instruction.adapter, read_adapter, tolerance)
        elif key == "detail" and tolerance > 0:
            problem = None  # numbers within words; the reason beside it has been compared
        else:
            problem = _value_difference(key, wanted, found, tolerance)
        if problem is not None:
            return problem
    return None


def _value_difference(path: str, wanted: Any, found: Any, tolerance: float) -> str | None:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in {**wanted, **found}:
            problem = _value_difference(f"{path}.{key}", wanted.get(key), found.get(key), tolerance)
            if problem is not None:
                return problem
        return None
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
            problem = _value_difference(f"{path}[{index}]", one, other, tolerance)
            if problem is not None:
                return problem
        return None
    if wanted == found:
        return None
    if (
        isinstance(wanted, float)
        and isinstance(found, float)
        and math.isclose(wanted, found, rel_tol=tolerance, abs_tol=tolerance)
    ):
        return None
    return f"{path} is {found!r}, on record {wanted!r}"


def _adapter_difference(
    checksum: str, found: Adapter, read_adapter: ReadAdapter, tolerance: float
) -> str | None:
    problem = f"the adapter's checksum is {found.checksum[:12]}, on record {checksum[:12]}"
    try:
        wanted = read_adapter(checksum)
    except DamagedError:
        # Nothing to measure with; later uploads' norms are distances from this adapter.
        return None if tolerance > 0 else problem
    try:
        gap, length = distance(found, wanted), norm(wanted)
    except AdapterError as error:
        return f"{problem}: {error}"
    if tolerance > 0 and gap <= tolerance * length:
        return None
    return f"{problem}; they are {gap:.3g} apart, where the recorded one is {length:.3g} long"


def describe(row: Row | None, *, body: bool = True) -> str:
    """Return an event or instruction on one line, for people; perhaps without its details."""
    if row is None:
        return "nothing"
    words = [row.name]
    for label, value in (
        ("task", row.task_id), ("client", row.client_id), ("version", row.version)
    ):  # fmt: skip
        if value is not None:
            words.append(f"{label} {value}")
    if body and row.body:
        words.append(json.dumps(row.body, separators=(", ", ": ")))
    return " ".join(words)

"""Virtual time: events leave by their time, and ties in the order in which they were scheduled.

Some events are expected: what they will bring can be worked out beforehand. ``ahead`` tells which
are next, and each waits in line from then on, so that it is sorted once however early it is asked
for.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Generator, Iterable
from operator import itemgetter
from typing import Any, Generic, TypeVar

from alignfed.errors import FleetError

EventT = TypeVar("EventT")
ExpectedT = TypeVar("ExpectedT")


class VirtualClock(Generic[EventT, ExpectedT]):
    """Events in order of their time, and of their scheduling where times are equal."""

    def __init__(self) -> None:
        """Begin at zero with nothing scheduled."""
        # Entries are ``(time_s, sequence, event)``; no two have the same sequence.
        self._heap: list[tuple[float, int, Any]] = []
        self._expected: list[tuple[float, int, ExpectedT]] = []
        self._line: list[tuple[float, int, ExpectedT]] = []  # latest first
        self._sequence = 0
        self._now_s = 0.0

    @classmethod
    def restore(
        cls,
        now_s: float,
        sequence: int,
        pending: Iterable[tuple[float, int, EventT | ExpectedT]],
        expected: Callable[[EventT | ExpectedT], bool],
    ) -> VirtualClock[EventT, ExpectedT]:
        """Return a clock that goes on where another one was listed by ``pending``."""
        clock = cls()
        for entry in pending:
            queue: list[Any] = clock._expected if expected(entry[2]) else clock._heap
            queue.append(entry)
        heapq.heapify(clock._heap)
        heapq.heapify(clock._expected)
        clock._sequence = sequence
        clock._now_s = now_s
        return clock

    @property
    def now_s(self) -> float:
        """Virtual seconds since the start: the time of the last event that left."""
        return self._now_s

    @property
    def sequence(self) -> int:
        """How many events were ever scheduled."""
        return self._sequence

    def __len__(self) -> int:
        """Return the number of events still to come."""
        return len(self._heap) + len(self._expected) + len(self._line)

    def schedule(self, time_s: float, event: EventT) -> None:
        """Put an event on the clock.

        Raises:
            FleetError: the time lies in the past, or is not a finite number.
        """
        if not self._now_s <= time_s < math.inf:
            raise self._refusal(time_s, event)
        heapq.heappush(self._heap, (time_s, self._sequence, event))
        self._sequence += 1

    def expect(self, time_s: float, event: ExpectedT) -> None:
        """Put an event on the clock that ``ahead`` may tell of.

        Raises:
            FleetError: the time lies in the past, or is not a finite number.
        """
        if not self._now_s <= time_s < math.inf:
            raise self._refusal(time_s, event)
        heapq.heappush(self._expected, (time_s, self._sequence, event))
        self._sequence += 1

    def ahead(self) -> Generator[ExpectedT, None, None]:
        """Yield the expected events never told of before, earliest first; they stay on the clock.

        Close it before anything else is done with the clock.
        """
        told = []
        try:
            while self._expected:
                entry = heapq.heappop(self._expected)
                told.append(entry)
                yield entry[2]
        finally:
            self._line += told
            self._line.sort(reverse=True)

    def pop(self) -> tuple[float, EventT | ExpectedT]:
        """Remove and return the next event with its time, and move the clock there.

        Raises:
            IndexError: nothing is scheduled.
        """
        heap, expected, line = self._heap, self._expected, self._line
        entry: tuple[float, int, Any]
        if line and (not expected or line[-1] < expected[0]) and (not heap or line[-1] < heap[0]):
            entry = line.pop()
        elif expected and (not heap or expected[0] < heap[0]):
            entry = heapq.heappop(expected)
        else:
            entry = heapq.heappop(heap)
        self._now_s = entry[0]
        return entry[0], entry[2]

    def pending(self) -> list[tuple[float, int, EventT | ExpectedT]]:
        """Return everything scheduled, in the order in which it will leave."""
        return sorted([*self._heap, *self._expected, *self._line], key=itemgetter(0, 1))

    def _refusal(self, time_s: float, event: EventT | ExpectedT) -> FleetError:
        return FleetError(
            f"cannot schedule {type(event).__name__} at {time_s} s: the clock stands at"
            f" {self._now_s} s, and times must be finite",
            time_s=time_s,
            now_s=self._now_s,
        )

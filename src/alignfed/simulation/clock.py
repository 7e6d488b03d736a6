"""Virtual time: a heap of ``(time_s, sequence, event)``; ties leave in the order they came."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import Generic, TypeVar

from alignfed.errors import FleetError

EventT = TypeVar("EventT")


class VirtualClock(Generic[EventT]):
    """Events in order of their time, and of their scheduling where times are equal."""

    def __init__(self) -> None:
        """Begin at zero with nothing scheduled."""
        self._heap: list[tuple[float, int, EventT]] = []
        self._sequence = 0
        self._now_s = 0.0

    @classmethod
    def restore(
        cls, now_s: float, sequence: int, pending: Iterable[tuple[float, int, EventT]]
    ) -> VirtualClock[EventT]:
        """Return a clock that goes on where another one was listed by ``pending``."""
        clock = cls()
        clock._heap = list(pending)
        heapq.heapify(clock._heap)
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
        return len(self._heap)

    def schedule(self, time_s: float, event: EventT) -> None:
        """Put an event on the clock.

        Raises:
            FleetError: the time lies in the past, or is not a finite number.
        """
        if not self._now_s <= time_s < math.inf:
            raise FleetError(
                f"cannot schedule {type(event).__name__} at {time_s} s: the clock stands at"
                f" {self._now_s} s, and times must be finite",
                time_s=time_s,
                now_s=self._now_s,
            )
        heapq.heappush(self._heap, (time_s, self._sequence, event))
        self._sequence += 1

    def pop(self) -> tuple[float, EventT]:
        """Remove and return the next event with its time, and move the clock there.

        Raises:
            IndexError: nothing is scheduled.
        """
        time_s, _, event = heapq.heappop(self._heap)
        self._now_s = time_s
        return time_s, event

    def pending(self) -> list[tuple[float, int, EventT]]:
        """Return everything scheduled, in the order in which it will leave."""
        return sorted(self._heap, key=lambda entry: entry[:2])

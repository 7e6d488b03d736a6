"""Evaluations beside the driver's loop: a server that scores a version still answers devices."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from alignfed.core.instructions import Evaluate
from alignfed.core.ports import Evaluation

MOST_WAITING = 8
"""Versions that may wait to be scored; with more, the oldest that waits is passed over."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A version's score."""

    version: int
    evaluation: Evaluation


class Scoring:
    """Scores one version after the other in a thread that begins when there is something to do."""

    def __init__(self, evaluate: Callable[[Evaluate], Evaluation]) -> None:
        """Score with ``evaluate``, which one thread at a time calls."""
        self._evaluate = evaluate
        self._waiting: deque[Evaluate] = deque()
        self._done: queue.SimpleQueue[Scored | BaseException] = queue.SimpleQueue()
        self._running: threading.Thread | None = None

    @property
    def pending(self) -> int:
        """Versions whose scores are not fetched yet."""
        return len(self._waiting) + (self._running is not None)

    def ask(self, instruction: Evaluate) -> int | None:
        """Have a version scored; return the version that is passed over instead, if any is."""
        passed_over = None
        if len(self._waiting) >= MOST_WAITING:
            passed_over = self._waiting.popleft().version
        self._waiting.append(instruction)
        self._begin()
        return passed_over

    def fetch(self) -> Scored | None:
        """Return a score that has come, if any has.

        Raises:
            Exception: whatever scoring raised.
        """
        try:
            found = self._done.get_nowait()
        except queue.Empty:
            return None
        if self._running is not None:
            self._running.join()
            self._running = None
        if isinstance(found, BaseException):
            raise found
        self._begin()
        return found

    def _begin(self) -> None:
        if self._running is not None or not self._waiting:
            return
        instruction = self._waiting.popleft()

        def score() -> None:
            try:
                self._done.put(Scored(instruction.version, self._evaluate(instruction)))
            except BaseException as error:  # handed to whoever asks next
                self._done.put(error)

        self._running = threading.Thread(target=score, name="alignfed-scoring", daemon=True)
        self._running.start()


__all__ = ["MOST_WAITING", "Scored", "Scoring"]

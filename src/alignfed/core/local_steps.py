"""Local steps by device speed: every task is to compute about as long as any other.

A device that is ten times as slow as the middle one holds a version ten times as long, and what it
uploads is that much staler. With a tenth of the steps it comes back when the others do, with less
to say and more often; a fast device says more with every transfer. A client's speed is what it
says of itself: seconds a local step, measured when its trainer comes up and again with each task.
Whoever says nothing takes the usual steps. FedCompass (``compass.py``) measures at the server and
has groups arrive together; here nobody waits for anybody. Nothing here reads a clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median_high

_RENEWALS = 16
"""The middle speed is taken anew when this part of all speeds has been learnt since."""


@dataclass(slots=True)
class ClientSpeeds:
    """What clients said; the coordinator owns it.

    Attributes:
        step_s: by client, seconds a local step.
        middle_s: their upper median, when it was taken last.
        learnt: how many were learnt since then.
    """

    step_s: dict[int, float] = field(default_factory=dict)
    middle_s: float = 0.0
    learnt: int = 0


@dataclass(frozen=True, slots=True)
class StepsBySpeed:
    """Assigns local steps.

    Attributes:
        steps: what a client of middle speed takes, at least 1.
        spread: nobody takes more than this multiple of ``steps``, at least 1; nor less than one.
        kept: share of what was known of a client's speed that is kept when it says it again.
    """

    steps: int
    spread: float = 3.0
    kept: float = 0.5

    def learn(self, state: ClientSpeeds, client_id: int, step_s: float | None) -> None:
        """Take note of what a client says of its speed; what is no duration says nothing."""
        if not isinstance(step_s, int | float) or not 0.0 < step_s < math.inf:
            return
        known_s = state.step_s.get(client_id, step_s)
        state.step_s[client_id] = self.kept * known_s + (1.0 - self.kept) * step_s
        state.learnt += 1

    def assign(self, state: ClientSpeeds, client_id: int) -> int:
        """Return the local steps of a client's next task."""
        own_s = state.step_s.get(client_id)
        if own_s is None:
            return self.steps
        if state.learnt * _RENEWALS >= len(state.step_s):
            state.middle_s, state.learnt = median_high(state.step_s.values()), 0
        return self.fit(own_s, state.middle_s)

    def fit(self, own_s: float, middle_s: float) -> int:
        """Return the local steps of a client whose step takes ``own_s``, by the middle one's."""
        return max(1, round(self.steps * min(self.spread, middle_s / own_s)))

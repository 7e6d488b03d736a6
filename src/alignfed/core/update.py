"""Tasks and updates: what goes to a client and what comes back. Both are frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field

from alignfed.core.adapter import Adapter
from alignfed.core.value import value


@value(frozen=True, slots=True)
class Task:
    """One dispatch of work to one client.

    Attributes:
        task_id: unique in a run, increasing in order of dispatch.
        client_id: whom it goes to.
        base_version: the server version whose adapter the client starts from.
        dispatch: how many tasks this client was given before; with the run's seed it fixes the
            task's batches, so that adding a client shifts nobody else's draws.
        deadline_s: when the server stops waiting (infinity: never).
        steps: local steps to take, where a scheduler assigns them; None leaves it to the client's
            own settings.
    """

    task_id: int
    client_id: int
    base_version: int
    dispatch: int
    deadline_s: float = float("inf")
    steps: int | None = None


@value(frozen=True, slots=True)
class Update:
    """One upload: a client's adapter after local training.

    Attributes:
        task_id: the task it answers.
        client_id: who sends it.
        base_version: the server version the client started from.
        adapter: the trained adapter itself (not a difference).
        num_examples: training examples it was computed from.
        metrics: what the client agreed to report, for example ``loss`` and ``tokens``.
    """

    task_id: int
    client_id: int
    base_version: int
    adapter: Adapter
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def reported_tokens(self) -> float:
        """Tokens the client says it trained on; 0 where it says nothing that is a count."""
        tokens = self.metrics.get("tokens", 0.0)
        counts = isinstance(tokens, (int, float)) and 0.0 < tokens < math.inf
        return float(tokens) if counts else 0.0

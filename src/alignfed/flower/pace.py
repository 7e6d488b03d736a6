"""How long a device may take, and how much it may send: learned and counted, one client at a time.

Nothing here reads a clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PaceSettings:
    """Times and rates.

    Attributes:
        first_ttl_s: how long a device may take for its first task.
        word_ttl_s: how long it may take to answer when it is not to train, at most.
        min_ttl_s: a message is never given less.
        max_ttl_s: nor more.
        patience: multiple of the expected duration that is waited.
        uploads_per_minute: uploads of one client, beside those it was asked for, that are looked
            into; more are turned away.
    """

    first_ttl_s: float = 3600.0
    word_ttl_s: float = 300.0
    min_ttl_s: float = 60.0
    max_ttl_s: float = 43_200.0
    patience: float = 5.0
    uploads_per_minute: float = 60.0


@dataclass(slots=True)
class Pace:
    """What was learned of each client.

    Attributes:
        settings: times and rates.
        expected_s: mean duration of a client's tasks, later ones counting more.
        steps: local steps of its latest task.
        allowance: uploads a client may still send unasked, and when that was reckoned.
    """

    settings: PaceSettings
    expected_s: dict[int, float] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    allowance: dict[int, tuple[float, float]] = field(default_factory=dict)

    def learn(self, client_id: int, duration_s: float, steps: int = 1) -> None:
        """Note how long a task of so many local steps took from order to answer."""
        self.steps[client_id] = steps
        known_s = self.expected_s.get(client_id, duration_s)
        # A device that slows down is believed at once, one that speeds up by and by.
        self.expected_s[client_id] = max(duration_s, 0.7 * known_s + 0.3 * duration_s)

    def ttl_s(self, client_id: int, steps: int = 1) -> float:
        """Return how long to wait for a task of so many local steps before it is given up."""
        settings = self.settings
        expected_s = self.expected_s.get(client_id)
        wanted_s = settings.first_ttl_s
        if expected_s is not None:
            longer = max(1.0, steps / self.steps[client_id])
            wanted_s = settings.patience * expected_s * longer
        return min(max(wanted_s, settings.min_ttl_s), settings.max_ttl_s)

    def word_ttl_s(self, client_id: int) -> float:
        """Return how long to wait for an answer to a message that asks for no training."""
        return min(self.ttl_s(client_id), self.settings.word_ttl_s)

    def admit(self, client_id: int, now_s: float) -> bool:
        """Return whether one more upload that nobody asked for is looked into, and count it."""
        most = self.settings.uploads_per_minute
        left, since_s = self.allowance.get(client_id, (most, now_s))
        left = min(most, left + (now_s - since_s) * most / 60.0)
        admitted = left >= 1.0
        self.allowance[client_id] = (left - 1.0 if admitted else left, now_s)
        return admitted


__all__ = ["Pace", "PaceSettings"]

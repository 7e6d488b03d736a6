"""What changes on a device over time: a pure function of (device, virtual time).

So two rules on the same fleet meet the same devices, whatever each asks of them and when. Factors
multiply durations: 2 means twice as slow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from alignfed.errors import FleetError
from alignfed.simulation.draws import exponential, normal, stream_key, uniform

SHORTEST_S = 1e-3
"""The shortest slot or mean stay: below it a simulation does little but change conditions."""


class Conditions(Protocol):
    """The state of every device at every virtual time."""

    @property
    def steady(self) -> bool:
        """Whether every factor is 1 and every device available, for ever, and nothing fails."""
        ...

    def compute_factor(self, device_id: int, time_s: float) -> float:
        """Return by how much computing takes longer than the device's profile says."""
        ...

    def network_factor(self, device_id: int, time_s: float) -> float:
        """Return by how much a transfer takes longer than the device's profile says."""
        ...

    def next_step_s(self, device_id: int, time_s: float) -> float:
        """Return when a factor may change next (infinity: never)."""
        ...

    def available(self, device_id: int, time_s: float) -> bool:
        """Return whether the device can be reached and may train."""
        ...

    def next_change_s(self, device_id: int, time_s: float) -> float:
        """Return when availability flips next (infinity: never)."""
        ...

    def next_failure_s(self, device_id: int, time_s: float) -> float:
        """Return when a task running then would next vanish without a word."""
        ...

    def loses_tasks(self) -> bool:
        """Return whether tasks vanish without a word at all."""
        ...

    def marks_up_to(self, horizon_s: float) -> float:
        """Return how many changes and failures a device has up to a time, about."""
        ...


@dataclass(frozen=True, slots=True)
class Variation:
    """How devices vary over time.

    Attributes:
        slot_s: factors are constant for this long.
        compute_sigma: log-normal spread of the compute factor (median 1).
        network_sigma: log-normal spread of the network factor (median 1).
        mean_on_s: mean time a device stays available (infinity: always).
        mean_off_s: mean time it stays away.
        failures_per_hour: rate at which whatever runs on a device vanishes.
    """

    slot_s: float = 300.0
    compute_sigma: float = 0.0
    network_sigma: float = 0.0
    mean_on_s: float = math.inf
    mean_off_s: float = 3600.0
    failures_per_hour: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name in ("slot_s", "mean_on_s", "mean_off_s"):
            if not (value := getattr(self, name)) >= SHORTEST_S:
                raise FleetError(
                    f"{name}={value}, must be at least {SHORTEST_S:g} s", field=name, value=value
                )
        for name, most in (("compute_sigma", 5), ("network_sigma", 5), ("failures_per_hour", 1e9)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise FleetError(
                    f"{name}={value}, must be between 0 and {most:g}", field=name, value=value
                )


class GeneratedConditions:
    """Conditions drawn from a seed: each draw belongs to one device and one slot or interval."""

    def __init__(self, seed: int, variation: Variation) -> None:
        """Derive the streams; nothing is drawn before it is asked for."""
        self.seed = seed
        self.variation = variation
        self._compute = stream_key(seed, "compute")
        self._network = stream_key(seed, "network")
        self._phase = stream_key(seed, "phase")
        self._constant = variation.compute_sigma == variation.network_sigma == 0
        self.steady = (
            self._constant and variation.mean_on_s == math.inf and variation.failures_per_hour == 0
        )
        self._flips = _Renewals(stream_key(seed, "availability"))
        self._failures = _Renewals(stream_key(seed, "failure"))

    def compute_factor(self, device_id: int, time_s: float) -> float:
        """See ``Conditions``."""
        sigma = self.variation.compute_sigma
        return _factor(self._compute, sigma, device_id, self._slot(time_s)) if sigma else 1.0

    def network_factor(self, device_id: int, time_s: float) -> float:
        """See ``Conditions``."""
        sigma = self.variation.network_sigma
        return _factor(self._network, sigma, device_id, self._slot(time_s)) if sigma else 1.0

    def next_step_s(self, device_id: int, time_s: float) -> float:
        """See ``Conditions``."""
        return math.inf if self._constant else (self._slot(time_s) + 1) * self.variation.slot_s

    def available(self, device_id: int, time_s: float) -> bool:
        """See ``Conditions``."""
        if self.variation.mean_on_s == math.inf:
            return True
        flips, _ = self._flip_after(device_id, time_s)
        return self._begins_on(device_id) == (flips % 2 == 0)

    def next_change_s(self, device_id: int, time_s: float) -> float:
        """See ``Conditions``."""
        if self.variation.mean_on_s == math.inf:
            return math.inf
        return self._flip_after(device_id, time_s)[1]

    def next_failure_s(self, device_id: int, time_s: float) -> float:
        """See ``Conditions``."""
        rate = self.variation.failures_per_hour
        if rate == 0:
            return math.inf
        mean_s = 3600.0 / rate
        return self._failures.after(device_id, time_s, (mean_s, mean_s))[1]

    def loses_tasks(self) -> bool:
        """See ``Conditions``."""
        return self.variation.failures_per_hour > 0

    def marks_up_to(self, horizon_s: float) -> float:
        """See ``Conditions``."""
        given = self.variation
        a_second = 0.0 if self._constant else 1 / given.slot_s
        return horizon_s * (
            a_second + 2 / (given.mean_on_s + given.mean_off_s) + given.failures_per_hour / 3600.0
        )

    def _flip_after(self, device_id: int, time_s: float) -> tuple[int, float]:
        on_s, off_s = self.variation.mean_on_s, self.variation.mean_off_s
        means = (on_s, off_s) if self._begins_on(device_id) else (off_s, on_s)
        return self._flips.after(device_id, time_s, means)

    def _begins_on(self, device_id: int) -> bool:
        on_s, off_s = self.variation.mean_on_s, self.variation.mean_off_s
        return uniform(self._phase, device_id) < on_s / (on_s + off_s)

    def _slot(self, time_s: float) -> int:
        slot_s = self.variation.slot_s
        slot = int(time_s // slot_s)
        # Division rounds; the slot is defined by its borders, so that a recording agrees.
        while (slot + 1) * slot_s <= time_s:
            slot += 1
        while slot * slot_s > time_s:
            slot -= 1
        return slot


class _Renewals:
    """Times of events whose gaps are exponential; remembers the last gap asked for, by device."""

    def __init__(self, key: int) -> None:
        self._key = key
        self._last: dict[int, tuple[int, float, float]] = {}

    def after(self, device_id: int, time_s: float, means: tuple[float, float]) -> tuple[int, float]:
        """Return how many events came up to ``time_s``, and the time of the next one."""
        count, begin_s, end_s = self._last.get(device_id, (-1, 0.0, 0.0))
        if time_s < begin_s or count < 0:
            count, begin_s = 0, 0.0
            end_s = means[0] * exponential(self._key, device_id, 0)
        while end_s <= time_s:
            count, begin_s = count + 1, end_s
            end_s += means[count % 2] * exponential(self._key, device_id, count)
        self._last[device_id] = (count, begin_s, end_s)
        return count, end_s


def _factor(key: int, sigma: float, device_id: int, slot: int) -> float:
    return math.exp(sigma * normal(key, device_id, slot))

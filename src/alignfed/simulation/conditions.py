"""What changes on a device over time: a pure function of (device, virtual time).

So two rules on the same fleet meet the same devices, whatever each asks of them and when. Factors
multiply durations: 2 means twice as slow.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from alignfed.errors import FleetError
from alignfed.simulation.draws import exponential, normal, stream_key, uniform


class Conditions(Protocol):
    """The state of every device at every virtual time."""

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
            if not getattr(self, name) > 0:
                raise FleetError(f"{name}={getattr(self, name)}, must be above 0", field=name)
        for name in ("compute_sigma", "network_sigma", "failures_per_hour"):
            if not 0 <= getattr(self, name) < math.inf:
                raise FleetError(f"{name}={getattr(self, name)}, must be at least 0", field=name)


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


@dataclass(frozen=True, slots=True)
class Steps:
    """A step function of time: ``values[i]`` from ``times_s[i]`` on; the first time is 0."""

    times_s: Sequence[float] = (0.0,)
    values: Sequence[float] = (1.0,)

    def at(self, time_s: float) -> float:
        """Return the value at a time."""
        return self.values[bisect_right(self.times_s, time_s) - 1]

    def next_s(self, time_s: float) -> float:
        """Return the next time at which a value begins (infinity: none)."""
        place = bisect_right(self.times_s, time_s)
        return self.times_s[place] if place < len(self.times_s) else math.inf


@dataclass(frozen=True, slots=True)
class RecordedDevice:
    """What was recorded of one device up to a horizon.

    Attributes:
        compute: compute factors over time.
        network: network factors over time.
        changes_s: when availability flips, increasing.
        begins_available: whether the device is available at time 0.
        failures_s: when whatever runs vanishes, increasing.
    """

    compute: Steps = field(default_factory=Steps)
    network: Steps = field(default_factory=Steps)
    changes_s: Sequence[float] = ()
    begins_available: bool = True
    failures_s: Sequence[float] = ()


class RecordedConditions:
    """Conditions read back from a recording; past its horizon it begins again."""

    def __init__(self, devices: Sequence[RecordedDevice], horizon_s: float) -> None:
        """Replay recordings that are ``horizon_s`` long (infinity: they never begin again)."""
        self.devices = devices
        self.horizon_s = horizon_s

    def compute_factor(self, device_id: int, time_s: float) -> float:
        """See ``Conditions``."""
        return self.devices[device_id].compute.at(self._local(time_s)[0])

    def network_factor(self, device_id: int, time_s: float) -> float:
        """See ``Conditions``."""
        return self.devices[device_id].network.at(self._local(time_s)[0])

    def next_step_s(self, device_id: int, time_s: float) -> float:
        """See ``Conditions``."""
        device = self.devices[device_id]
        local_s, start_s = self._local(time_s)
        step_s = min(device.compute.next_s(local_s), device.network.next_s(local_s))
        varies = len(device.compute.times_s) > 1 or len(device.network.times_s) > 1
        return _after(time_s, start_s + min(step_s, self.horizon_s if varies else math.inf))

    def available(self, device_id: int, time_s: float) -> bool:
        """See ``Conditions``."""
        device = self.devices[device_id]
        flips = bisect_right(device.changes_s, self._local(time_s)[0])
        return device.begins_available == (flips % 2 == 0)

    def next_change_s(self, device_id: int, time_s: float) -> float:
        """See ``Conditions``."""
        device = self.devices[device_id]
        if not device.changes_s:
            return math.inf
        local_s, start_s = self._local(time_s)
        place = bisect_right(device.changes_s, local_s)
        if place < len(device.changes_s):
            return _after(time_s, start_s + device.changes_s[place])
        if len(device.changes_s) % 2:  # ends in the other state than it begins in
            return _after(time_s, start_s + self.horizon_s)
        return _after(time_s, start_s + self.horizon_s + device.changes_s[0])

    def next_failure_s(self, device_id: int, time_s: float) -> float:
        """See ``Conditions``."""
        failures = self.devices[device_id].failures_s
        if not failures:
            return math.inf
        local_s, start_s = self._local(time_s)
        place = bisect_right(failures, local_s)
        if place < len(failures):
            return _after(time_s, start_s + failures[place])
        return _after(time_s, start_s + self.horizon_s + failures[0])

    def _local(self, time_s: float) -> tuple[float, float]:
        if time_s < self.horizon_s:
            return time_s, 0.0
        start_s = math.floor(time_s / self.horizon_s) * self.horizon_s
        return time_s - start_s, start_s


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


def _after(time_s: float, found_s: float) -> float:
    """Rounding in a repeated recording may place what comes next at now; it comes after."""
    return found_s if found_s > time_s else math.nextafter(time_s, math.inf)


def _factor(key: int, sigma: float, device_id: int, slot: int) -> float:
    return math.exp(sigma * normal(key, device_id, slot))

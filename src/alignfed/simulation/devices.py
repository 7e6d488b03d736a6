"""Devices and where they sit in a fleet: sizes only, constant over time."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignfed.errors import FleetError

_COLUMNS = (
    "flops_per_s",
    "efficiency",
    "memory_bytes",
    "down_bytes_per_s",
    "up_bytes_per_s",
)


@dataclass(frozen=True, slots=True)
class Device:
    """One device.

    Attributes:
        device_id: equal to the id of the client that runs on it.
        tier: name of its kind.
        flops_per_s: peak FLOP/s of what trains on it.
        efficiency: fraction of the peak that training achieves, in (0, 1].
        memory_bytes: memory that training may use.
        down_bytes_per_s: from the server to the device.
        up_bytes_per_s: from the device to the server.
    """

    device_id: int
    tier: str
    flops_per_s: float
    efficiency: float
    memory_bytes: float
    down_bytes_per_s: float
    up_bytes_per_s: float

    def __post_init__(self) -> None:
        """Refuse sizes no device has."""
        for name in _COLUMNS:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise FleetError(
                    f"device {self.device_id} has {name}={value}, must be a finite number above 0",
                    device_id=self.device_id,
                    field=name,
                    value=value,
                )
        if self.efficiency > 1:
            raise FleetError(
                f"device {self.device_id} has efficiency={self.efficiency}, must be at most 1",
                device_id=self.device_id,
                value=self.efficiency,
            )


class DeviceTable(Sequence[Device]):
    """Devices as columns: 68 bytes each, made into a ``Device`` when looked at."""

    def __init__(self, devices: Sequence[Device] | Iterator[Device]) -> None:
        """Copy devices into columns.

        Raises:
            FleetError: there are none, or their ids are not 0, 1, 2 ...
        """
        every = list(devices)
        if [device.device_id for device in every] != list(range(len(every))) or not every:
            raise FleetError("a fleet needs at least one device, with ids 0, 1, 2 ... in order")
        self.tiers = tuple(dict.fromkeys(device.tier for device in every))
        numbers = {tier: number for number, tier in enumerate(self.tiers)}
        self._tier = np.array([numbers[device.tier] for device in every], dtype=np.int32)
        self._columns = {
            name: np.array([getattr(device, name) for device in every]) for name in _COLUMNS
        }
        columns = self._columns
        # Python's arrays give out floats; looking a single element up in a NumPy column makes an
        # object first, and these are looked up for every task.
        self.seconds_per_flop = _doubles(1.0 / (columns["flops_per_s"] * columns["efficiency"]))
        self.seconds_per_byte_down = _doubles(1.0 / columns["down_bytes_per_s"])
        self.seconds_per_byte_up = _doubles(1.0 / columns["up_bytes_per_s"])

    def __len__(self) -> int:
        """Return the number of devices."""
        return len(self._tier)

    def __getitem__(self, index: int) -> Device:  # type: ignore[override]
        """Return one device."""
        values = {name: float(column[index]) for name, column in self._columns.items()}
        return Device(int(index) % len(self), self.tiers[self._tier[index]], **values)

    def smallest_memory(self) -> Device:
        """Return the device with the least memory."""
        return self[int(np.argmin(self._columns["memory_bytes"]))]

    def too_small(self, needed_bytes: float) -> list[int]:
        """Return the ids of devices with less memory than needed."""
        return [int(i) for i in np.flatnonzero(self._columns["memory_bytes"] < needed_bytes)]


def _doubles(column: NDArray[np.float64]) -> array[float]:
    return array("d", column.tobytes())

"""Small fleets for tests."""

from __future__ import annotations

from typing import Any

from alignfed.simulation.conditions import GeneratedConditions, Variation
from alignfed.simulation.devices import Device, DeviceTable
from alignfed.simulation.fleet import Fleet


def make_fleet(speeds: list[float], seed: int = 0, **variation: Any) -> Fleet:
    """Return a fleet whose devices compute at ``speeds`` FLOP/s and move 1,000 bytes a second."""
    devices = DeviceTable(
        Device(i, "test", speed, 1.0, 1e9, 1e3, 1e3) for i, speed in enumerate(speeds)
    )
    return Fleet(devices, GeneratedConditions(seed, Variation(**variation)))

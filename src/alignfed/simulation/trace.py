"""Device traces: what a fleet was like over time, written down and replayed under another rule.

A trace is JSON Lines: a header, then one line a device with its profile, its factors over time,
when its availability flips and when whatever runs on it vanishes. Up to its horizon a replayed
fleet gives the very times of the recorded one; past it, the trace begins again.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignfed.errors import FleetError, TraceError
from alignfed.simulation.conditions import RecordedConditions, RecordedDevice, Steps
from alignfed.simulation.devices import Device, DeviceTable
from alignfed.simulation.fleet import Fleet

FORMAT = "alignfed-device-trace"
VERSION = 1


def record_trace(fleet: Fleet, horizon_s: float) -> str:
    """Return the trace of a fleet from virtual time 0 up to ``horizon_s``, as text.

    Raises:
        FleetError: the horizon is not a finite number above 0.
    """
    if not 0 < horizon_s < math.inf:
        raise FleetError(f"a trace's horizon is {horizon_s} s, must be finite and above 0")
    header = {"format": FORMAT, "version": VERSION, "horizon_s": horizon_s, "devices": len(fleet)}
    lines = [header]
    for device in fleet.devices:
        lines.append({**asdict(device), **_record_device(fleet, device.device_id, horizon_s)})
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


def read_trace(path: Path) -> Fleet:
    """Return the fleet that a trace was recorded from.

    Raises:
        TraceError: the file is missing, of another format or version, or malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"device trace {path} cannot be read: {error}", path=str(path)) from error
    if not lines:
        raise TraceError(f"device trace {path} is empty", path=str(path))
    header = _parse(lines[0], 1, path)
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise TraceError(
            f"{path} is not a device trace of version {VERSION}: its first line says format"
            f" {header.get('format')!r}, version {header.get('version')!r}",
            path=str(path),
        )
    if header.get("devices") != len(lines) - 1:
        raise TraceError(
            f"{path} announces {header.get('devices')!r} devices and holds {len(lines) - 1};"
            " it was cut off or edited",
            path=str(path),
        )
    horizon_s = header.get("horizon_s")
    if not isinstance(horizon_s, int | float) or not 0 < horizon_s < math.inf:
        raise TraceError(f"{path}: horizon_s is {horizon_s!r}, must be above 0", path=str(path))
    devices, recorded = [], []
    for number, line in enumerate(lines[1:], start=2):
        one = _parse(line, number, path)
        try:
            device, conditions = _read_device(one)
        except (KeyError, TypeError, ValueError, FleetError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise TraceError(f"{path}, line {number}: {what}", path=str(path)) from error
        devices.append(device)
        recorded.append(conditions)
    return Fleet(DeviceTable(devices), RecordedConditions(recorded, float(horizon_s)))


def _record_device(fleet: Fleet, device_id: int, horizon_s: float) -> dict[str, Any]:
    conditions = fleet.conditions
    steps: list[list[float]] = []
    time_s = 0.0
    while time_s < horizon_s:
        compute = conditions.compute_factor(device_id, time_s)
        network = conditions.network_factor(device_id, time_s)
        if not steps or [compute, network] != steps[-1][1:]:
            steps.append([time_s, compute, network])
        time_s = conditions.next_step_s(device_id, time_s)
    changes, time_s = [], conditions.next_change_s(device_id, 0.0)
    while time_s < horizon_s:
        changes.append(time_s)
        time_s = conditions.next_change_s(device_id, time_s)
    failures, time_s = [], conditions.next_failure_s(device_id, 0.0)
    while time_s < horizon_s:
        failures.append(time_s)
        time_s = conditions.next_failure_s(device_id, time_s)
    return {
        "steps": steps,
        "begins_available": conditions.available(device_id, 0.0),
        "changes_s": changes,
        "failures_s": failures,
    }


def _read_device(one: dict[str, Any]) -> tuple[Device, RecordedDevice]:
    device = Device(
        int(one["device_id"]),
        str(one["tier"]),
        *(
            float(one[name])
            for name in (
                "flops_per_s",
                "efficiency",
                "memory_bytes",
                "down_bytes_per_s",
                "up_bytes_per_s",
            )
        ),
    )
    times = _increasing([step[0] for step in one["steps"]], "steps")
    if not times or times[0] != 0:
        raise ValueError("steps must begin at time 0")
    factors = [[float(step[i]) for step in one["steps"]] for i in (1, 2)]
    for series in factors:
        if not all(0 < factor < math.inf for factor in series):
            raise ValueError("every factor must be a finite number above 0")
    return device, RecordedDevice(
        Steps(times, factors[0]),
        Steps(times, factors[1]),
        _increasing(one["changes_s"], "changes_s"),
        bool(one["begins_available"]),
        _increasing(one["failures_s"], "failures_s"),
    )


def _increasing(values: list[Any], name: str) -> list[float]:
    found = [float(value) for value in values]
    if any(not later > earlier for earlier, later in itertools.pairwise(found)):
        raise ValueError(f"{name} must increase")
    if any(not 0 <= value < math.inf for value in found):
        raise ValueError(f"{name} must be finite and not negative")
    return found


def _parse(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{path}, line {number} is not JSON: {error}", path=str(path)) from error
    if not isinstance(value, dict):
        raise TraceError(f"{path}, line {number} is not a JSON object", path=str(path))
    return value

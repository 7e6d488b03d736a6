"""Fleets from public device traces: FLASH, Pensieve, LiveLab with Carat, and FedScale.

Each reader states its conversion. A file that lacks what it should hold is refused by file, place
and value.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignfed.errors import TraceError
from alignfed.simulation.conditions import RecordedConditions, RecordedDevice, Steps
from alignfed.simulation.devices import Device, DeviceTable
from alignfed.simulation.draws import stream_key, uniform
from alignfed.simulation.presets import KINDS

_LIVELAB_PERIOD_S = 172_800.0
_FEDSCALE_FLOPS_PER_SAMPLE = 3 * 0.3e9 * 2
"""FedScale's ``computation`` is a phone's latency on MobileNet (0.3 G multiply-adds a sample)."""


def flash_devices(folder: Path, count: int, seed: int) -> DeviceTable:
    """Return phones whose speeds follow FLASH (Yang et al. 2021).

    A phone's AI-Benchmark score, drawn from the models FLASH met, sets its speed: the median score
    is the ``phone-mid`` kind, and speed grows with the square root of the score. FLASH's measured
    batch times give exponents of 0.63 (Galaxy Note10 against Redmi Note 8) and 0.35 (Redmi Note 8
    against the slowest tier), geometric means over its four models. Bandwidth is that of a device
    drawn from ``network_speed.csv`` (its mean, in kB/s).

    Raises:
        TraceError: a file is missing or malformed.
    """
    names = _read_json(folder / "real2benchmark.json", dict)
    scores = _read_json(folder / "benchmark2score.json", dict)
    found = sorted(float(scores[name]) for name in names.values() if name in scores)
    if not found:
        raise TraceError(f"{folder} has no phone with an AI-Benchmark score", path=str(folder))
    speeds = _read_csv(folder / "network_speed.csv", ("down_mean_kBps", "up_mean_kBps"))
    median = found[len(found) // 2]
    key, middle = stream_key(seed, "flash"), KINDS["phone-mid"].device
    devices = []
    for i in range(count):
        score = found[int(uniform(key, i, 0) * len(found))]
        row = speeds[int(uniform(key, i, 1) * len(speeds))]
        devices.append(
            replace(
                middle,
                device_id=i,
                tier="flash-phone",
                flops_per_s=middle.flops_per_s * math.sqrt(score / median),
                down_bytes_per_s=row["down_mean_kBps"] * 1e3,
                up_bytes_per_s=row["up_mean_kBps"] * 1e3,
            )
        )
    return DeviceTable(devices)


def pensieve_conditions(
    path: Path, devices: DeviceTable, seed: int
) -> tuple[DeviceTable, RecordedConditions]:
    """Give each device a bandwidth trace of Pensieve (Mao et al. 2017), repeated end to end.

    Both directions follow it: a device's bandwidth is the trace's mean, and the network factor is
    that mean over the rate of the moment (a rate of 0 is read as a hundredth of the mean).

    Raises:
        TraceError: the file is missing or malformed.
    """
    rows = _read_csv(path, ("t_s", "mbps"), text=("trace_id",))
    traces: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        traces.setdefault(row["trace_id"], []).append((row["t_s"], row["mbps"]))
    names, key = sorted(traces), stream_key(seed, "bandwidth")
    table, recorded, horizon_s = [], [], 0.0
    for device in devices:
        samples = traces[names[int(uniform(key, device.device_id) * len(names))]]
        times = [time_s - samples[0][0] for time_s, _ in samples]
        if any(later <= earlier for earlier, later in itertools.pairwise(times)):
            raise TraceError(f"{path}: the times of a trace do not increase", path=str(path))
        mean = sum(rate for _, rate in samples) / len(samples)
        if mean <= 0:
            raise TraceError(f"{path}: a trace never transfers anything", path=str(path))
        factors = [mean / max(rate, mean / 100) for _, rate in samples]
        rate_bytes = mean * 1e6 / 8
        table.append(replace(device, down_bytes_per_s=rate_bytes, up_bytes_per_s=rate_bytes))
        recorded.append((times, factors))
        horizon_s = max(horizon_s, times[-1])
    return DeviceTable(table), RecordedConditions(
        [RecordedDevice(network=_repeat(*one, horizon_s)) for one in recorded], horizon_s
    )


def livelab_devices(path: Path, count: int, seed: int) -> tuple[DeviceTable, RecordedConditions]:
    """Return phones with 48 hours of LiveLab and Carat behaviour, as FedScale joined them.

    Speed is (CPU + GPU peak) x the percentage available at each moment; the link is 54 Mbit/s at
    best, times the moment's 802.11g rate over 54; ``active`` and ``inactive`` give availability.
    More devices than phones reuse them, each shifted in time by its own draw.

    Raises:
        TraceError: the file is missing or malformed.
    """
    phones = _read_json(path, list)
    fields = (
        *("CPU_FLOPS", "GPU_FLOPS", "availability", "timestamps-carat"),
        *("rate", "timestamps-livelab", "active", "inactive"),
    )
    for place, phone in enumerate(phones):
        for name in fields:
            if not isinstance(phone, Mapping) or name not in phone:
                raise TraceError(f"{path}: entry {place} lacks {name!r}", path=str(path))
    if not phones:
        raise TraceError(f"{path} holds no devices", path=str(path))
    key, middle = stream_key(seed, "livelab"), KINDS["phone-low"].device
    devices, recorded = [], []
    for i in range(count):
        phone = phones[i % len(phones)]
        # The first of each phone keeps its own hours; copies live in another time zone.
        shift_s = 0.0 if i < len(phones) else uniform(key, i) * _LIVELAB_PERIOD_S
        peak = float(phone["CPU_FLOPS"]) + float(phone["GPU_FLOPS"])
        devices.append(
            replace(
                middle,
                device_id=i,
                tier=str(phone.get("model", "phone")),
                flops_per_s=peak,
                down_bytes_per_s=54e6 / 8,
                up_bytes_per_s=54e6 / 8,
            )
        )
        compute = _series(phone["timestamps-carat"], phone["availability"], 100.0, 1.0)
        network = _series(phone["timestamps-livelab"], phone["rate"], 54.0, 1.0)
        changes = _changes(phone["active"], phone["inactive"])
        recorded.append(_shifted(compute, network, changes, shift_s))
    return DeviceTable(devices), RecordedConditions(recorded, _LIVELAB_PERIOD_S)


def fedscale_devices(path: Path, count: int, seed: int) -> DeviceTable:
    """Return devices from FedScale's ``client_device_capacity`` fields, as CSV or JSON.

    ``computation`` is milliseconds a sample: FedScale's figures are MobileNet inference latencies,
    so a device's achieved FLOP/s are a training step's FLOPs (three forward passes of 0.6 GFLOP)
    over three times the latency. ``communication`` is kbit/s, used both ways. More devices than
    entries draw among them.

    Raises:
        TraceError: the file is missing or malformed.
    """
    if path.suffix == ".csv":
        entries: Sequence[Mapping[str, Any]] = _read_csv(path, ("computation", "communication"))
    else:
        raw = _read_json(path, (dict, list))
        entries = list(raw.values()) if isinstance(raw, dict) else raw
    if not entries:
        raise TraceError(f"{path} holds no devices", path=str(path))
    key, middle = stream_key(seed, "fedscale"), KINDS["phone-mid"].device
    devices = []
    for i in range(count):
        place = i if count <= len(entries) else int(uniform(key, i) * len(entries))
        entry = entries[place]
        latency_ms = _positive(entry, "computation", path, place)
        rate_kbit = _positive(entry, "communication", path, place)
        devices.append(
            Device(
                i,
                "fedscale",
                _FEDSCALE_FLOPS_PER_SAMPLE / (3 * latency_ms * 1e-3),
                1.0,
                middle.memory_bytes,
                rate_kbit * 1e3 / 8,
                rate_kbit * 1e3 / 8,
            )
        )
    return DeviceTable(devices)


def _series(times: Sequence[float], values: Sequence[float], best: float, least: float) -> Steps:
    """Turn samples of ``percent of best`` into factors; the first one holds from time 0."""
    factors: dict[float, float] = {}
    for time_s, value in zip(times, values, strict=False):
        factors[float(time_s)] = best / max(float(value), least)
    ordered = sorted(factors.items())
    if not ordered:
        return Steps()
    kept = [(0.0, ordered[0][1])]
    for time_s, factor in ordered:
        if time_s > 0 and factor != kept[-1][1]:
            kept.append((time_s, factor))
    return Steps([time_s for time_s, _ in kept], [factor for _, factor in kept])


def _changes(active: Sequence[float], inactive: Sequence[float]) -> list[tuple[float, bool]]:
    """Return ``(time_s, available)`` in order, without repeats of a state."""
    marks = sorted([(float(t), True) for t in active] + [(float(t), False) for t in inactive])
    kept: list[tuple[float, bool]] = []
    for time_s, state in marks:
        if kept and kept[-1][0] == time_s:
            kept.pop()
        if time_s < _LIVELAB_PERIOD_S and (not kept or kept[-1][1] != state):
            kept.append((time_s, state))
    return kept


def _shifted(
    compute: Steps, network: Steps, changes: list[tuple[float, bool]], shift_s: float
) -> RecordedDevice:
    period_s = _LIVELAB_PERIOD_S
    state_at_end = changes[-1][1] if changes else True
    begins = state_at_end
    for time_s, state in changes:
        if time_s <= shift_s:
            begins = state
    moved = sorted(((time_s - shift_s) % period_s, state) for time_s, state in changes)
    flips, current = [], begins
    for time_s, state in moved:
        if state != current and time_s > 0:
            flips.append(time_s)
            current = state
    return RecordedDevice(
        _shift_steps(compute, shift_s), _shift_steps(network, shift_s), flips, begins
    )


def _shift_steps(steps: Steps, shift_s: float) -> Steps:
    if shift_s == 0:
        return steps
    pairs = [(0.0, steps.at(shift_s))]
    moved = ((t - shift_s) % _LIVELAB_PERIOD_S for t in steps.times_s)
    pairs += sorted((t, v) for t, v in zip(moved, steps.values, strict=True) if t > 0)
    return Steps([t for t, _ in pairs], [v for _, v in pairs])


def _repeat(times: Sequence[float], factors: Sequence[float], horizon_s: float) -> Steps:
    """Repeat a trace end to end up to a horizon."""
    length_s = times[-1] + (times[-1] - times[-2] if len(times) > 1 else 1.0)
    every_time: list[float] = []
    every_factor: list[float] = []
    start_s = 0.0
    while start_s < horizon_s or not every_time:
        for time_s, factor in zip(times, factors, strict=True):
            if start_s + time_s < horizon_s or not every_time:
                every_time.append(start_s + time_s)
                every_factor.append(factor)
        start_s += length_s
    return Steps(every_time, every_factor)


def _positive(entry: Mapping[str, Any], name: str, path: Path, place: int) -> float:
    try:
        value = float(entry[name])
    except (KeyError, TypeError, ValueError):
        value = math.nan
    if not 0 < value < math.inf:
        raise TraceError(
            f"{path}: entry {place} has no {name!r} above 0"
            f" (found {entry.get(name) if isinstance(entry, Mapping) else entry!r})",
            path=str(path),
            field=name,
        )
    return value


def _read_json(path: Path, kind: type | tuple[type, ...]) -> Any:
    value = _read(path, json.load)
    if not isinstance(value, kind):
        raise TraceError(f"{path} holds a {type(value).__name__}, not what is expected")
    return value


def _read_csv(path: Path, numbers: Sequence[str], text: Sequence[str] = ()) -> list[dict[str, Any]]:
    rows = _read(path, lambda file: list(csv.DictReader(file)))
    found = []
    for place, row in enumerate(rows, start=2):
        one: dict[str, Any] = {}
        for name in (*numbers, *text):
            if row.get(name) in (None, ""):
                raise TraceError(
                    f"{path}, line {place}: column {name!r} is missing or empty", field=name
                )
            one[name] = row[name]
        for name in numbers:
            try:
                one[name] = float(one[name])
            except ValueError:
                raise TraceError(
                    f"{path}, line {place}: {name} is {one[name]!r}, not a number", field=name
                ) from None
        found.append(one)
    if not found:
        raise TraceError(f"{path} holds no rows", path=str(path))
    return found


def _read(path: Path, parse: Callable[[io.TextIOBase], Any]) -> Any:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
                return parse(file)
        with path.open(encoding="utf-8", newline="") as file:
            return parse(file)
    except FileNotFoundError:
        raise TraceError(
            f"trace file {path} does not exist; check the path", path=str(path)
        ) from None
    except (OSError, ValueError, csv.Error, EOFError) as error:
        raise TraceError(f"trace file {path} cannot be read: {error}", path=str(path)) from error


__all__ = [
    "fedscale_devices",
    "flash_devices",
    "livelab_devices",
    "pensieve_conditions",
]

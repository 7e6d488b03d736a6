"""Named fleets and spreads; every figure with where it comes from.

Peak FLOP/s are fp32 on CPU cores (cores x clock x FLOPs a cycle: 8 for a Cortex-A53, A55 or A72
with one 128-bit fused multiply-add a cycle, 16 with two as in A76, A78 and A720, 32 with four as
in X4; Arm's software optimisation guides) and bf16 with sparsity off on GPUs (vendors' data
sheets). Efficiency on silos is the 46 % that Chowdhery et al. 2022 (arXiv 2204.02311, table 3)
measured for PaLM, rounded down; for LoRA fine-tuning on the other devices we found no public
measurement, so 20 % is an assumption: state your own with ``fleet.efficiency``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from alignfed.errors import FleetError
from alignfed.simulation.devices import Device, DeviceTable
from alignfed.simulation.draws import normal, stream_key, uniform

_GIB = 1024.0**3
_MB = 1e6

TRAINING_SHARE = 0.5
"""Share of a device's memory that training may use beside the system and other programs."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of device with its figures.

    Attributes:
        device: the figures, as device 0.
        source: where they come from.
    """

    device: Device
    source: str


def _kind(
    tier: str,
    gflops: float,
    efficiency: float,
    memory_gib: float,
    down_mb: float,
    up_mb: float,
    source: str,
) -> Kind:
    return Kind(
        Device(0, tier, gflops * 1e9, efficiency, memory_gib * _GIB, down_mb * _MB, up_mb * _MB),
        source,
    )


KINDS: Mapping[str, Kind] = {
    kind.device.tier: kind
    for kind in (
        _kind(
            "phone-low",
            115,
            0.2,
            3 * TRAINING_SHARE,
            3.7,
            2.6,
            "Snapdragon 450: 8 x Cortex-A53 at 1.8 GHz, 3 GB; network: lower quartile of FLASH's"
            " phones (Yang et al. 2021)",
        ),
        _kind(
            "phone-mid",
            205,
            0.2,
            6 * TRAINING_SHARE,
            4.3,
            3.3,
            "Snapdragon 778G: 4 x A78 at 2.2-2.4 GHz, 4 x A55 at 1.9 GHz, 6 GB; network: median of"
            " FLASH's phones (Yang et al. 2021)",
        ),
        _kind(
            "phone-high",
            392,
            0.2,
            12 * TRAINING_SHARE,
            7.3,
            5.1,
            "Snapdragon 8 Gen 3: X4 at 3.3 GHz, 5 x A720 at 3.0-3.2 GHz, 2 x A520 at 2.3 GHz,"
            " 12 GB; network: upper quartile of FLASH's phones (Yang et al. 2021)",
        ),
        _kind(
            "raspberry-pi-4",
            48,
            0.2,
            4 * TRAINING_SHARE,
            12.5,
            2.5,
            "4 x Cortex-A72 at 1.5 GHz, 4 GB (Raspberry Pi product brief); network: a 100/20 Mbit/s"
            " line, the broadband definition of the FCC of 2024",
        ),
        _kind(
            "raspberry-pi-5",
            154,
            0.2,
            8 * TRAINING_SHARE,
            12.5,
            2.5,
            "4 x Cortex-A76 at 2.4 GHz, 8 GB (Raspberry Pi product brief); network as above",
        ),
        _kind(
            "jetson-orin-nano",
            1280,
            0.2,
            8 * TRAINING_SHARE,
            12.5,
            2.5,
            "1,024 CUDA cores at 625 MHz, 8 GB shared (NVIDIA data sheet); network as above",
        ),
        _kind(
            "laptop-cpu",
            307,
            0.2,
            16 * TRAINING_SHARE,
            12.5,
            2.5,
            "Core i5-1135G7: 4 cores at 2.4 GHz, AVX-512 (Intel ARK), 16 GB; network as above",
        ),
        _kind(
            "laptop-gpu",
            14600,
            0.2,
            8,
            12.5,
            2.5,
            "GeForce RTX 4060 Laptop: 3,072 cores at 2.37 GHz, 8 GB (NVIDIA); network as above",
        ),
        _kind(
            "silo-t4",
            65000,
            0.4,
            16,
            125,
            125,
            "NVIDIA T4: 65 TFLOP/s in half precision, 16 GB (data sheet); 1 Gbit/s Ethernet",
        ),
        _kind(
            "silo-a100",
            312000,
            0.4,
            40,
            125,
            125,
            "NVIDIA A100: 312 TFLOP/s in bf16, 40 GB (data sheet); 1 Gbit/s Ethernet",
        ),
    )
}
"""Kinds of devices by tier name."""


@dataclass(frozen=True, slots=True)
class FleetPreset:
    """A named mix of kinds.

    Attributes:
        name: as recipes spell it.
        description: one line.
        shares: share of each kind, summing to 1.
    """

    name: str
    description: str
    shares: Mapping[str, float]

    @property
    def spread(self) -> float:
        """Ratio of the fastest to the slowest kind in achieved FLOP/s."""
        speeds = [
            KINDS[tier].device.flops_per_s * KINDS[tier].device.efficiency for tier in self.shares
        ]
        return max(speeds) / min(speeds)


PRESETS: Mapping[str, FleetPreset] = {
    preset.name: preset
    for preset in (
        FleetPreset(
            "phones",
            "phones in three tiers; shares low and mid as FLASH draws them, high raised to 10 %",
            {"phone-low": 0.48, "phone-mid": 0.42, "phone-high": 0.10},
        ),
        FleetPreset(
            "boards",
            "single-board computers",
            {"raspberry-pi-4": 0.4, "raspberry-pi-5": 0.4, "jetson-orin-nano": 0.2},
        ),
        FleetPreset(
            "laptops", "laptops, one in four with a GPU", {"laptop-cpu": 0.75, "laptop-gpu": 0.25}
        ),
        FleetPreset(
            "silos", "data-centre GPUs at institutions", {"silo-t4": 0.5, "silo-a100": 0.5}
        ),
        FleetPreset(
            "equal",
            "laptops of one kind; with as many clients, the counterpart of `alignfed up`",
            {"laptop-cpu": 1.0},
        ),
        FleetPreset(
            "mixed",
            "boards, phones and laptops together: hardware that differs three hundredfold",
            {
                "raspberry-pi-4": 0.15,
                "phone-low": 0.25,
                "phone-mid": 0.25,
                "phone-high": 0.10,
                "laptop-cpu": 0.15,
                "laptop-gpu": 0.10,
            },
        ),
    )
}
"""Fleets by name."""

_GOLDEN = (math.sqrt(5) - 1) / 2


def preset_devices(name: str, count: int, seed: int) -> DeviceTable:
    """Return ``count`` devices of a preset, its shares kept as evenly as their number allows.

    Raises:
        FleetError: there is no such preset.
    """
    if name not in PRESETS:
        raise FleetError(
            f"no fleet is called {name!r}; choose one of {', '.join(PRESETS)}", name=name
        )
    preset = PRESETS[name]
    # A golden-ratio walk spreads any number of devices evenly over the shares, and device i's
    # kind does not depend on how many follow it (Roberts 2018, "quasirandom sequences").
    start = uniform(stream_key(seed, "kinds"), 0)
    return DeviceTable(
        replace(_pick(preset.shares, (start + i * _GOLDEN) % 1.0), device_id=i)
        for i in range(count)
    )


def spread_devices(
    distribution: str, spread: float, count: int, seed: int, reference: str = "phone-mid"
) -> DeviceTable:
    """Return devices whose compute speed spreads around a reference kind.

    Args:
        distribution: ``"lognormal"`` (``spread`` is sigma; the median is the reference) or
            ``"pareto"`` (``spread`` is the shape; slowness, not speed, has the heavy tail, and
            the reference is the fastest).
        spread: above 0.
        count: devices.
        seed: of the draws.
        reference: tier whose memory, network and efficiency all devices have.

    Raises:
        FleetError: an unknown distribution or reference, or a spread out of range.
    """
    if reference not in KINDS:
        raise FleetError(
            f"no device kind is called {reference!r}; choose one of {', '.join(KINDS)}"
        )
    if not 0 < spread < math.inf:
        raise FleetError(f"fleet spread is {spread}, must be above 0", spread=spread)
    key, device = stream_key(seed, "spread"), KINDS[reference].device
    if distribution == "lognormal":
        factors = [math.exp(spread * normal(key, i)) for i in range(count)]
    elif distribution == "pareto":
        factors = [uniform(key, i) ** (1.0 / spread) for i in range(count)]
    else:
        raise FleetError(f"no spread is called {distribution!r}; choose lognormal or pareto")
    return DeviceTable(
        replace(device, device_id=i, flops_per_s=device.flops_per_s * factor)
        for i, factor in enumerate(factors)
    )


def with_efficiency(devices: DeviceTable, efficiency: float) -> DeviceTable:
    """Return the same devices with another achieved fraction of their peak."""
    return DeviceTable(replace(device, efficiency=efficiency) for device in devices)


def _pick(shares: Mapping[str, float], place: float) -> Device:
    upto = 0.0
    for tier, share in shares.items():
        upto += share
        if place < upto:
            return KINDS[tier].device
    return KINDS[list(shares)[-1]].device

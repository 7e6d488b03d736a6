"""Random draws by name: each is a pure function of (seed, stream, device, index).

No generator is shared, so adding a device, or asking in another order, shifts nobody's draws.
The hash is SplitMix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
number generators"), applied once for each key.
"""

from __future__ import annotations

import math
import zlib
from statistics import NormalDist

_MASK = (1 << 64) - 1
_NORMAL = NormalDist()


def stream_key(seed: int, stream: str) -> int:
    """Return the key of a named stream of draws."""
    return _mix(_mix(seed & _MASK) ^ zlib.crc32(stream.encode()))


def uniform(key: int, device_id: int, index: int = 0) -> float:
    """Return a number strictly between 0 and 1, uniform."""
    mixed = _mix(_mix(key ^ (device_id + 1)) ^ (index + 1))
    # 52 bits: with 53 the half is rounded away, and the largest draw would be 1.
    return ((mixed >> 12) + 0.5) / (1 << 52)


def normal(key: int, device_id: int, index: int = 0) -> float:
    """Return a standard normal number."""
    return _NORMAL.inv_cdf(uniform(key, device_id, index))


def exponential(key: int, device_id: int, index: int = 0) -> float:
    """Return an exponential number of mean 1."""
    return -math.log(uniform(key, device_id, index))


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)

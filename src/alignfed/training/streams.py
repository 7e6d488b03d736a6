"""Seeds by name: every generator derives from (seed, stream, keys), so that no draw shifts another.

``keys`` are a client's id and the number of its dispatch, or nothing.
"""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, stream: str, *keys: int) -> np.random.Generator:
    """Return the generator of a named stream."""
    return np.random.default_rng(_sequence(seed, stream, keys))


def torch_seed(seed: int, stream: str, *keys: int) -> int:
    """Return a seed for torch's own generators, below 2**63."""
    return int(_sequence(seed, stream, keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _sequence(seed: int, stream: str, keys: tuple[int, ...]) -> np.random.SeedSequence:
    # A checksum of the stream's name, not hash(): that differs from process to process.
    return np.random.SeedSequence((seed, zlib.crc32(stream.encode()), *keys))

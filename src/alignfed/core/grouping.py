"""Version-aware grouping: updates that share a base version are directly comparable.

Within a group, ``delta_i = mean + deviation_i``. The mean is the signal the group shares; the
deviations, which sum to zero, are what its clients disagree on. A weighted sum over the group is

    sum_i c_i delta_i = (sum_i c_i) mean + sum_i (c_i - mean of c) deviation_i,

so a deviation enters only in so far as members are weighted unequally, and to damp deviations is
to move the coefficients of a group towards their mean. No vector is touched here.

The paper's grouping (as reported of arXiv 2606.08197, Eq. 5) drops the mean instead and keeps the
deviation. Taken literally a group of one then becomes zero and the server does not move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def group_by_version(versions: Sequence[int]) -> Mapping[int, tuple[int, ...]]:
    """Return the positions that hold each base version, oldest version first."""
    groups: dict[int, list[int]] = {version: [] for version in sorted(set(versions))}
    for position, version in enumerate(versions):
        groups[version].append(position)
    return {version: tuple(positions) for version, positions in groups.items()}


def group_means(coefficients: Sequence[float], versions: Sequence[int]) -> tuple[float, ...]:
    """Return, for each position, the mean coefficient of its version's group."""
    means = [0.0] * len(versions)
    for positions in group_by_version(versions).values():
        mean = math.fsum(coefficients[position] for position in positions) / len(positions)
        for position in positions:
            means[position] = mean
    return tuple(means)


def damp_deviations(
    coefficients: Sequence[float], versions: Sequence[int], keep: float
) -> tuple[float, ...]:
    """Return the coefficients that replace ``delta_i`` by ``mean + keep deviation_i`` per group.

    Args:
        coefficients: of each update.
        versions: base version of each update.
        keep: share of the deviations kept, from 0 (the group's mean alone) to 1 (no change).
    """
    means = group_means(coefficients, versions)
    return tuple(
        mean + keep * (coefficient - mean)
        for coefficient, mean in zip(coefficients, means, strict=True)
    )


def drop_means(coefficients: Sequence[float], versions: Sequence[int]) -> tuple[float, ...]:
    """Return the coefficients that replace ``delta_i`` by its deviation alone (paper, Eq. 5).

    ``sum_i w_i (delta_i - mean) = sum_i (w_i - mean of w) delta_i``: zero for a group of one, and
    for any group whose members have equal weights.
    """
    means = group_means(coefficients, versions)
    return tuple(coefficient - mean for coefficient, mean in zip(coefficients, means, strict=True))

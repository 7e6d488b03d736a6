"""Fairness weights: freshness pulls slow clients down, participation pulls them up.

Weights are normalised over the whole buffer. Normalised inside each version's group and then
added, a lone update would get the weight of a whole group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

NORM_FLOOR = 1e-12
"""The epsilon of Eq. 7, against an update of length zero."""


def freshness(staleness: int, decay: float) -> float:
    """Return ``exp(-gamma s)``: 1 for a fresh update, never growing with staleness."""
    return math.exp(-decay * staleness)


def relative_freshness(staleness: int, usual: float, exponent: float) -> float:
    """Return ``(1 + s / (1 + s_mean)) ** -exponent``: 1 for a fresh update, never growing with s.

    Staleness counts in units of what is usual in this fleet, so that the same exponent serves a
    mean of 2 and of 24; and the factor falls as a power, not exponentially: the slowest clients,
    many times as stale as the mean, may hold what nobody else does and must still be heard.

    Args:
        staleness: of the update.
        usual: mean staleness of lately applied updates.
        exponent: 0 ignores staleness.
    """
    return float((1.0 + staleness / (1.0 + usual)) ** -exponent)


def participation(uploads: int, mean_uploads: float, exponent: float, limit: float) -> float:
    """Return ``(mean uploads / n_i) ** exponent``, clipped to ``[1 / limit, limit]``.

    Args:
        uploads: the client's accepted uploads, this one included (at least 1).
        mean_uploads: accepted uploads per client seen so far.
        exponent: 0 ignores participation; 1 gives every client the same influence over time.
        limit: largest factor, and the inverse of the smallest.
    """
    factor = float((mean_uploads / uploads) ** exponent)
    return min(limit, max(1.0 / limit, factor))


def evenness(norm: float, middle: float, exponent: float, limit: float) -> float:
    """Return ``(middle / |delta_i|) ** exponent``, clipped to ``[1 / limit, limit]``.

    A device that has time for a tenth of the steps moves about a tenth as far. Eq. 7 as reported
    takes all of an update's length out of its weight (exponent 1); half of it is less noise.

    Args:
        norm: the update's length.
        middle: the median length in its buffer.
        exponent: 0 leaves lengths as they are; 1 gives every update the same length.
        limit: largest factor, and the inverse of the smallest.
    """
    if min(norm, middle) <= NORM_FLOOR or not math.isfinite(middle):
        return 1.0  # who says nothing has no length to even out
    factor = float((middle / norm) ** exponent)
    return min(limit, max(1.0 / limit, factor))


def cap_mean(weights: Sequence[float]) -> tuple[float, ...]:
    """Return the weights, scaled down together if their mean over the buffer is above 1.

    A buffer of rare clients is not amplified as a whole, while a buffer that is stale as a whole
    stays damped. Order and ratios are kept.
    """
    excess = max(1.0, math.fsum(weights) / len(weights))
    return tuple(weight / excess for weight in weights)


def shares(weights: Sequence[float]) -> tuple[float, ...]:
    """Return the weights divided by their sum over the whole buffer; zeros stay zeros."""
    total = math.fsum(weights)
    return tuple(weight / total if total > 0 else 0.0 for weight in weights)


def reported_weight(staleness: int, norm: float, uploads: int, decay: float) -> float:
    """Return ``exp(-gamma s) (|delta| + eps)^-1 (n + 1)^-1/2`` before normalisation.

    As reported of arXiv 2606.08197, Eq. 7; ``n`` counts the client's earlier uploads, so that
    ``n + 1 = uploads``.
    """
    return float(freshness(staleness, decay) / (norm + NORM_FLOOR) / math.sqrt(uploads))

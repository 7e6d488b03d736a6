"""Fairness measures over clients; plain numbers in, one number out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alignfed.errors import AlignFedError


def jain_index(shares: Sequence[float]) -> float:
    """Return Jain's fairness index ``(sum x)^2 / (n sum x^2)``, between ``1 / n`` and 1.

    1 means equal shares (also when all are zero). Source: Jain, Chiu and Hawe 1984, DEC-TR-301.

    Raises:
        AlignFedError: no shares, or a negative one.
    """
    if not shares or min(shares) < 0:
        raise AlignFedError(
            f"Jain's index needs at least one share and none below 0, got {list(shares)[:5]}"
        )
    squares = sum(share * share for share in shares)
    return 1.0 if squares == 0 else sum(shares) ** 2 / (len(shares) * squares)


def worst_tenth_mean(losses: Sequence[float]) -> float:
    """Return the mean of the highest tenth (at least one) of the losses.

    Raises:
        AlignFedError: no losses.
    """
    if not losses:
        raise AlignFedError("the worst tenth of no clients is not defined")
    count = max(1, math.ceil(len(losses) / 10))
    return sum(sorted(losses, reverse=True)[:count]) / count

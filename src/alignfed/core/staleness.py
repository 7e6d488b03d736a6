"""Staleness and its discounts: pure functions of counts of server versions."""

from __future__ import annotations

from functools import cache
from typing import Literal, TypeAlias

from alignfed.errors import FutureVersionError, RuleError

Discount: TypeAlias = Literal["constant", "polynomial", "hinge"]
"""The names of the discounts in recipes."""

DISCOUNTS: tuple[Discount, ...] = ("constant", "polynomial", "hinge")


def staleness(server_version: int, base_version: int) -> int:
    """Return how many server versions have passed since the update's base.

    Raises:
        FutureVersionError: ``base_version`` is newer than ``server_version``.
    """
    if base_version > server_version:
        raise FutureVersionError(
            f"update has base_version={base_version}, server_version={server_version};"
            " a base cannot be newer than the server",
            base_version=base_version,
            server_version=server_version,
        )
    return server_version - base_version


def constant(staleness: int) -> float:
    """Return 1 for every staleness (Xie, Koyejo and Gupta 2019, arXiv 1903.03934, section 5.2).

    Raises:
        RuleError: a negative staleness.
    """
    _require_not_negative(staleness)
    return 1.0


def polynomial(staleness: int, exponent: float = 0.5) -> float:
    """Return ``(1 + s)^-p`` (arXiv 1903.03934, section 5.2; FedBuff: p = 1/2).

    Raises:
        RuleError: a negative staleness.
    """
    _require_not_negative(staleness)
    return float((1.0 + staleness) ** -exponent)


def hinge(staleness: int, slope: float = 10.0, start: int = 6) -> float:
    """Return 1 while ``s <= b``, then ``1 / (h (s - b) + 1)`` (arXiv 1903.03934, section 5.2).

    The 1 in the denominator keeps the discount from jumping above 1 for slopes below 1.

    Raises:
        RuleError: a negative staleness.
    """
    _require_not_negative(staleness)
    return 1.0 if staleness <= start else 1.0 / (slope * (staleness - start) + 1.0)


@cache  # asked for with every upload, of few different staleness
def discount(kind: str, staleness: int, exponent: float, slope: float, start: int) -> float:
    """Return the discount of that name; ``exponent`` is of one of them, the others of another.

    Raises:
        RuleError: a negative staleness or an unknown name.
    """
    if kind == "constant":
        return constant(staleness)
    if kind == "polynomial":
        return polynomial(staleness, exponent)
    if kind == "hinge":
        return hinge(staleness, slope, start)
    raise RuleError(f"discount={kind!r}, must be one of {', '.join(DISCOUNTS)}", discount=kind)


def _require_not_negative(staleness: int) -> None:
    if staleness < 0:
        raise RuleError(f"staleness={staleness}, must be at least 0", staleness=staleness)

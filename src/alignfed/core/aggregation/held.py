"""Updates kept until their flush, for rules that must see all of them together."""

from __future__ import annotations

from dataclasses import dataclass, field

from alignfed.core.adapter import Adapter

Pair = tuple[Adapter, Adapter]
"""A client's adapter and the one it started from."""


@dataclass(slots=True)
class HeldUpdates:
    """The buffered adapters in order of arrival, each beside its base.

    Attributes:
        pairs: ``(update, base)``.
    """

    pairs: list[Pair] = field(default_factory=list)


def hold(gathered: HeldUpdates | None, update: Adapter, base: Adapter) -> HeldUpdates:
    """Return what is held with one more pair."""
    held = HeldUpdates() if gathered is None else gathered
    held.pairs.append((update, base))
    return held


def held_pairs(gathered: HeldUpdates | None) -> list[Pair]:
    """Return the pairs held, for the caller to change as it likes."""
    return [] if gathered is None else list(gathered.pairs)

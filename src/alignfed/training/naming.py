"""Words for error messages. Nothing here decides anything."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or nothing if none is near."""
    by_folded = {candidate.casefold(): candidate for candidate in known}
    found = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return f"; did you mean {by_folded[found[0]]!r}?" if found else ""


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Return names joined by commas, cut after ``limit`` with a count of the rest."""
    every = list(names)
    shown = ", ".join(every[:limit])
    return f"{shown}, and {len(every) - limit} more" if len(every) > limit else shown or "none"

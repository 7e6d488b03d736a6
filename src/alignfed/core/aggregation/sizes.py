"""The size of a flush's work, from sizes alone: what a driver models server time from."""

from __future__ import annotations

from alignfed.core.ports import Flush
from alignfed.errors import RuleError


def require_updates(flush: Flush) -> None:
    """Refuse a flush without updates: no rule here has a meaning for it.

    Raises:
        RuleError: the buffer is empty.
    """
    if not flush.updates:
        raise RuleError(
            f"flush of version {flush.version} holds no updates; apply a rule to at least one",
            version=flush.version,
        )


def combining_bytes(flush: Flush) -> int:
    """Return the bytes one combination reads and writes: updates, bases, current, result."""
    read = sum([entry.size_bytes for entry in flush.updates])
    return read + 2 * flush.adapter.size_bytes


def comparing_bytes(flush: Flush) -> int:
    """Return the bytes that innovations and their Gram matrix read and write.

    Updates and bases are read, innovations of the same size as both (fp32 at most doubles them)
    are written and read once more.
    """
    read = sum(entry.size_bytes for entry in flush.updates)
    return 3 * read


def averaging_bytes(flush: Flush) -> int:
    """Return the bytes that one more version in a running mean reads and writes."""
    return 3 * flush.adapter.size_bytes

"""Values of the hot path: frozen for the type checker, quick to make when a run makes millions.

A frozen dataclass sets each field through ``object.__setattr__`` and takes several times longer to
make than a plain one. mypy refuses to change a field of either; see docs/adr/0012.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as value
else:
    from dataclasses import dataclass

    def value(*, frozen: bool, slots: bool):
        """Make a dataclass that compares and hashes as a frozen one; mypy reads ``dataclass``."""
        return dataclass(slots=slots, unsafe_hash=frozen)


__all__ = ["value"]

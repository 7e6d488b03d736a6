"""Who is who where nobody keeps a register: Flower's simulation engine, or a closed network."""

from __future__ import annotations


class FirstComeMembers:
    """Implements ``Members``: nodes become clients 0, 1, ... in the order of their appearance.

    The numbers hold for one process; a deployed server keeps a register instead.
    """

    def __init__(self) -> None:
        """Begin with nobody."""
        self._clients: dict[int, int] = {}

    def client_of(self, node_id: int) -> int:
        """Return a node's client; a new node gets the next number."""
        return self._clients.setdefault(node_id, len(self._clients))


__all__ = ["FirstComeMembers"]

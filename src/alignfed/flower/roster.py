"""Who is online: nodes become clients that join and leave."""

from __future__ import annotations

import math
from collections.abc import Iterable

from alignfed.core.events import ClientJoined, ClientLeft
from alignfed.errors import AlignFedError
from alignfed.flower.ports import Members
from alignfed.flower.post import PostOffice
from alignfed.flower.status import ServerStatus


class Roster:
    """Calls the roll now and then, and remembers since when somebody is away."""

    def __init__(
        self, post: PostOffice, members: Members, status: ServerStatus, every_s: float
    ) -> None:
        """Begin with nobody.

        Args:
            post: knows the nodes.
            members: knows who is behind them.
            status: is told.
            every_s: seconds between calls.
        """
        self._post = post
        self._members = members
        self._status = status
        self._every_s = every_s
        self._next_s = -math.inf
        self._away_since: dict[int, float] = {}
        self._presumed: set[int] = set()
        self.nodes: dict[int, int] = {}
        self.first_seen_s = math.inf

    def presume(self, client_ids: Iterable[int], now_s: float) -> None:
        """Take it that these are online, as a record says, until the next call."""
        self._presumed = set(client_ids)
        self._away_since = dict.fromkeys(self._presumed, now_s)

    def is_member(self, node_id: int, client_id: int) -> bool:
        """Return whether a node still stands for a client."""
        return self._members.client_of(node_id) == client_id

    def away_s(self, client_id: int, now_s: float) -> float:
        """Return for how long a client has been away (0: it is not)."""
        return now_s - self._away_since.get(client_id, now_s)

    def call(self, now_s: float) -> list[ClientJoined | ClientLeft]:
        """Return who joined and who left since the last call; nothing until it is due.

        Raises:
            AlignFedError: two nodes are online that stand for one client.
        """
        if now_s < self._next_s:
            return []
        self._next_s = now_s + self._every_s
        online: dict[int, int] = {}
        for node_id in sorted(self._post.nodes()):
            client_id = self._members.client_of(node_id)
            if client_id is not None and online.setdefault(client_id, node_id) != node_id:
                raise AlignFedError(
                    f"nodes {online[client_id]} and {node_id} both stand for client {client_id};"
                    " give each device a client of its own",
                    client_id=client_id,
                )
        known = self._presumed | set(self.nodes)
        left = sorted(known - set(online))
        joined = sorted(set(online) - set(self.nodes))
        self._presumed = set()
        self.nodes = online
        for client_id in left:
            self._away_since.setdefault(client_id, now_s)
            self._status.client(client_id).online = False
        for client_id, node_id in online.items():
            self._away_since.pop(client_id, None)
            client = self._status.client(client_id)
            client.online, client.node_id = True, node_id
            if client_id in joined:
                client.seen_s = now_s
        if online:
            self.first_seen_s = min(self.first_seen_s, now_s)
        return [
            *(ClientLeft(now_s, client_id) for client_id in left),
            *(ClientJoined(now_s, client_id) for client_id in joined),
        ]


__all__ = ["Roster"]

"""Messages on their way: pushed to nodes that are online, pulled as their replies come.

Flower's ``pull_messages`` returns once every reply it has claimed is there whole, so one device
with a slow line would hold up all others. Pulls therefore run in threads of their own: a pull that
hangs is left alone, and the next one brings what the others have sent meanwhile.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from alignfed.errors import AlignFedError

ABSENT = 3
"""Flower's code for a message, or its reply, that is no longer there."""

_MOST_PULLS = 16
"""Pulls that may hang at once; with more, new replies wait."""

_PULL_WAIT_S = 2.0
"""How long a step waits for a pull before it goes on without."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A message that a node has not answered yet.

    Attributes:
        node_id: whom it went to.
        client_id: which client that was then.
        task_id: the task it orders, if any.
        at_s: when it was pushed.
        ttl_s: how long its answer is waited for.
        acknowledged: tasks it acknowledges.
    """

    node_id: int
    client_id: int
    task_id: int | None
    at_s: float
    ttl_s: float
    acknowledged: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a message: content, or one of Flower's errors.

    Attributes:
        sent: the message.
        content: what the node answers; None: ``code`` and ``words`` say why there is nothing.
        code: Flower's error code.
        words: its explanation.
    """

    sent: Sent
    content: RecordDict | None = field(repr=False)
    code: int = 0
    words: str = ""


@dataclass(slots=True)
class _Pull:
    thread: threading.Thread
    found: queue.SimpleQueue[list[Message] | BaseException]


class PostOffice:
    """Sends and fetches; at most one message a node is under way."""

    def __init__(self, grid: Grid, message_type: str) -> None:
        """Use a grid whose run is set."""
        self._grid = grid
        self._message_type = message_type
        self._sent: dict[str, Sent] = {}
        self._busy: dict[int, str] = {}
        self._pulls: list[_Pull] = []
        self._activated: dict[int, str] = {}
        self._activated_at_push: dict[str, str] = {}

    @property
    def under_way(self) -> tuple[Sent, ...]:
        """Messages that wait for an answer."""
        return tuple(self._sent.values())

    def busy(self, node_id: int) -> bool:
        """Return whether a node has a message to answer."""
        return node_id in self._busy

    def nodes(self) -> frozenset[int]:
        """Return the nodes that are online."""
        self._activated = {
            node.node_id: node.last_activated_at or "" for node in self._grid.get_nodes()
        }
        return frozenset(self._activated)

    def push(self, sent: Sent, content: RecordDict) -> bool:
        """Send a message; return whether Flower took it.

        Raises:
            AlignFedError: the node has not answered the message before.
        """
        if sent.node_id in self._busy:
            raise AlignFedError(f"node {sent.node_id} has a message already", node_id=sent.node_id)
        message = Message(content, sent.node_id, self._message_type, ttl=sent.ttl_s)
        taken = [message_id for message_id in self._grid.push_messages([message]) if message_id]
        if not taken:
            return False
        self._sent[taken[0]] = sent
        self._busy[sent.node_id] = taken[0]
        self._activated_at_push[taken[0]] = self._activated.get(sent.node_id, "")
        return True

    def fetch(self, now_s: float) -> list[Reply]:
        """Return what has come since the last call, in the order in which it came.

        Raises:
            Exception: whatever Flower raises when the run is over or cannot be reached.
        """
        replies = []
        for message_id in self._overdue(now_s):
            ttl_s = self._sent[message_id].ttl_s
            replies.append(self._give_up(message_id, f"no answer in {ttl_s:.0f} s"))
        asked = list(self._sent)
        if self._sent and len(self._pulls) < _MOST_PULLS:
            self._pulls.append(self._begin_pull(asked))
            # Nearly always there at once; the clock of a hanging line must not be everybody's.
            self._pulls[-1].thread.join(_PULL_WAIT_S if len(self._pulls) == 1 else 0.2)
        for pull in list(self._pulls):
            if pull.thread.is_alive():
                continue
            self._pulls.remove(pull)
            found = pull.found.get()
            if isinstance(found, BaseException):
                raise found
            replies += [reply for one in found if (reply := self._taken(one)) is not None]
        # A process that was started anew knows nothing of what the one before had been sent, and
        # Flower says nothing of it either.
        for message_id in asked:
            if message_id in self._sent and self._restarted(message_id):
                replies.append(self._give_up(message_id, "its node was restarted"))
        return replies

    def _restarted(self, message_id: str) -> bool:
        now = self._activated.get(self._sent[message_id].node_id)
        return now is not None and now != self._activated_at_push[message_id]

    def _begin_pull(self, message_ids: Sequence[str]) -> _Pull:
        found: queue.SimpleQueue[list[Message] | BaseException] = queue.SimpleQueue()

        def pull() -> None:
            try:
                found.put(list(self._grid.pull_messages(message_ids)))
            except BaseException as error:  # handed to whoever asks next
                found.put(error)

        thread = threading.Thread(target=pull, name="alignfed-pull", daemon=True)
        thread.start()
        return _Pull(thread, found)

    def _taken(self, message: Message) -> Reply | None:
        message_id = message.metadata.reply_to_message_id
        if message_id not in self._sent:  # given up meanwhile
            return None
        sent = self._forget(message_id)
        if message.has_error():
            return Reply(sent, None, int(message.error.code), str(message.error.reason or ""))
        return Reply(sent, message.content)

    def _overdue(self, now_s: float) -> list[str]:
        # Flower says so too, but not where the pull that would bring its word hangs.
        return [
            message_id
            for message_id, sent in self._sent.items()
            if math.isfinite(sent.ttl_s) and now_s >= sent.at_s + sent.ttl_s
        ]

    def _give_up(self, message_id: str, words: str) -> Reply:
        return Reply(self._forget(message_id), None, ABSENT, words)

    def _forget(self, message_id: str) -> Sent:
        sent = self._sent.pop(message_id)
        del self._busy[sent.node_id]
        del self._activated_at_push[message_id]
        return sent


__all__ = ["ABSENT", "PostOffice", "Reply", "Sent"]

"""What the coordinator remembers. It alone changes these; drivers may only read them."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from alignfed.core.adapter import Adapter
from alignfed.core.admission import ExpiredTasks, NormHistory
from alignfed.core.instructions import StopReason
from alignfed.core.local_steps import ClientSpeeds, StepsBySpeed
from alignfed.core.lora.exchange import Exchange
from alignfed.core.ports import BufferedUpdate
from alignfed.core.update import Task
from alignfed.errors import CoordinatorError


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When a run ends; whichever comes first.

    Attributes:
        max_time_s: the driver's clock.
        max_uploads: answers to given tasks, accepted or refused.
        max_versions: published server steps.
        max_tokens: trained tokens that clients report with those answers.
        target_loss: loss on the common evaluation set to reach.
        patience: evaluations without an improvement of ``min_improvement``.
        min_improvement: smallest fall of the loss that counts, in nats.
    """

    max_time_s: float = math.inf
    max_uploads: float = math.inf
    max_versions: float = math.inf
    max_tokens: float = math.inf
    target_loss: float = -math.inf
    patience: float = math.inf
    min_improvement: float = 0.0

    def __post_init__(self) -> None:
        """Refuse limits that no run could meet."""
        for name in ("max_time_s", "max_uploads", "max_versions", "max_tokens", "patience"):
            if not getattr(self, name) > 0:
                raise CoordinatorError(f"{name}={getattr(self, name)}, must be above 0", name=name)


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """How many clients work at once, when the buffer is applied, and when to give up on a task.

    Attributes:
        concurrency: tasks in flight (asynchronous) or clients a round (synchronous).
        buffer_size: uploads that trigger a flush; a synchronous rule flushes by its barrier.
        flush_timeout_s: a non-empty buffer is applied this long after its first upload even if
            it is not full; for a synchronous rule, the longest a round may take.
        task_timeout_s: a task not answered this long after its dispatch is given up.
        retry_backoff_s: pause before a client that failed is given work again; doubles with
            each failure in a row, up to ``max_backoff_s``.
        max_backoff_s: longest such pause.
        max_norm_ratio: an upload whose innovation is longer than this multiple of the median of
            those accepted lately is refused (infinity: never).
        evaluate_every: published versions between evaluations.
        stop: when the run ends.
        local_steps: assigns local steps by clients' speed; None leaves them to the clients'
            settings, or to the rule's scheduler.
    """

    concurrency: int
    buffer_size: int
    flush_timeout_s: float = math.inf
    task_timeout_s: float = math.inf
    retry_backoff_s: float = 1.0
    max_backoff_s: float = 3600.0
    max_norm_ratio: float = 10.0
    evaluate_every: int = 1
    stop: StopConditions = StopConditions()
    local_steps: StepsBySpeed | None = None

    def __post_init__(self) -> None:
        """Refuse sizes and times that make no sense."""
        for name in ("concurrency", "buffer_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise CoordinatorError(
                    f"{name}={getattr(self, name)}, must be at least 1", name=name
                )
        for name in ("flush_timeout_s", "task_timeout_s", "max_norm_ratio"):
            if not getattr(self, name) > 0:
                raise CoordinatorError(f"{name}={getattr(self, name)}, must be above 0", name=name)
        if self.retry_backoff_s < 0 or self.max_backoff_s < self.retry_backoff_s:
            raise CoordinatorError(
                f"retry_backoff_s={self.retry_backoff_s}, must lie between 0 and"
                f" max_backoff_s={self.max_backoff_s}"
            )


@dataclass(slots=True)
class ClientRecord:
    """One client as the server sees it.

    Attributes:
        online: whether it can be reached.
        queued: whether it waits in the idle queue or is cooling after a failure.
        task_id: the task it holds, if any.
        dispatches: tasks given to it so far.
        uploads: its accepted uploads so far.
        failures: failures since its last accepted upload.
    """

    online: bool = True
    queued: bool = False
    task_id: int | None = None
    dispatches: int = 0
    uploads: int = 0
    failures: int = 0


@dataclass(slots=True)
class Snapshot:
    """The adapter of one server version and how many tasks in flight started from it.

    Attributes:
        adapter: the server's own.
        references: tasks in flight.
        sent: what clients of lower ranks were sent instead, by rank.
    """

    adapter: Adapter
    references: int = 0
    sent: dict[int, Adapter] = field(default_factory=dict)

    def sent_to(self, exchange: Exchange, client_id: int) -> Adapter:
        """Return what a client starts from at this version; each rank's share is made once."""
        if not exchange.ranks or (rank := exchange.ranks.get(client_id)) is None:
            return self.adapter
        if rank not in self.sent:
            self.sent[rank] = exchange.sent(self.adapter, client_id)
        return self.sent[rank]


@dataclass(slots=True)
class CoordinatorState:
    """Everything needed to go on from here.

    Attributes:
        adapter: adapter of the current version.
        rule_state: what the aggregation rule remembers.
        version: current server version.
        clients: by client id, every client that ever joined.
        idle: ids waiting for work, longest wait first; entries of clients that left are skipped.
        cooling: heap of ``(ready_at_s, client_id)`` after failures.
        tasks: tasks in flight by id.
        expired: tasks given up, to tell a late upload from a repeated one.
        deadlines: ``(deadline_s, task_id)`` in order of dispatch.
        snapshots: adapters by version, held while current or while a task in flight needs them.
        buffer: accepted uploads not yet applied.
        gathered: what the rule keeps of their adapters (None: the buffer is empty).
        schedule: what the rule's scheduler remembers (None: it has none).
        speeds: how fast clients say they are, where ``CoordinatorSettings.local_steps`` asks.
        rejections: refused uploads by reason.
        next_task_id: first id not yet given out.
        received: answers to given tasks, accepted or refused.
        accepted: uploads accepted.
        tokens: trained tokens reported with the answers received.
        participants: clients with at least one accepted upload.
        flush_due_s: when the buffer, or a synchronous round, is applied though not complete.
        wake_at_s: the earliest timer now set.
        best_loss: lowest evaluation loss so far.
        stale_evaluations: evaluations since ``best_loss`` last fell.
        evaluated_version: last version sent for evaluation (-1: none).
        started: whether the run has begun.
        stopped: why the run ended, if it has.
    """

    adapter: Adapter
    rule_state: Any
    norms: NormHistory
    version: int = 0
    clients: dict[int, ClientRecord] = field(default_factory=dict)
    idle: deque[int] = field(default_factory=deque)
    cooling: list[tuple[float, int]] = field(default_factory=list)
    tasks: dict[int, Task] = field(default_factory=dict)
    expired: ExpiredTasks = field(default_factory=ExpiredTasks)
    deadlines: deque[tuple[float, int]] = field(default_factory=deque)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    buffer: list[BufferedUpdate] = field(default_factory=list)
    gathered: Any = None
    schedule: Any = None
    speeds: ClientSpeeds = field(default_factory=ClientSpeeds)
    rejections: Counter[str] = field(default_factory=Counter)
    next_task_id: int = 0
    received: int = 0
    accepted: int = 0
    tokens: float = 0.0
    participants: int = 0
    flush_due_s: float = math.inf
    wake_at_s: float = math.inf
    best_loss: float = math.inf
    stale_evaluations: int = 0
    evaluated_version: int = -1
    started: bool = False
    stopped: StopReason | None = None


def check_invariants(state: CoordinatorState, settings: CoordinatorSettings) -> None:
    """Assert what must hold after every event; tests call it, runs need not."""
    assert len(state.tasks) <= settings.concurrency
    assert state.version in state.snapshots
    assert state.snapshots[state.version].adapter is state.adapter
    needed = Counter(task.base_version for task in state.tasks.values())
    for version, snapshot in state.snapshots.items():
        assert version <= state.version
        assert snapshot.references == needed[version]
        assert snapshot.references > 0 or version == state.version
    assert set(needed) <= set(state.snapshots)
    holders = {record.task_id for record in state.clients.values()} - {None}
    assert holders == set(state.tasks)
    queue = Counter(state.idle) + Counter(client_id for _, client_id in state.cooling)
    assert all(count == 1 for count in queue.values())
    assert all(record.queued == (queue[cid] == 1) for cid, record in state.clients.items())
    assert sum(record.uploads for record in state.clients.values()) == state.accepted
    assert not (state.tasks.keys() & state.expired.ids)

"""Protocols at the seams: what the core and the drivers ask of training, rules and journals."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from alignfed.core.adapter import Adapter
from alignfed.core.events import Event
from alignfed.core.instructions import Instruction, ServerWork
from alignfed.core.update import Task
from alignfed.core.value import value


@value(frozen=True, slots=True)
class TaskWork:
    """What a task will cost its device, known at dispatch, before anything is computed.

    Attributes:
        tokens: tokens (padding included) that pass through the model in all local steps.
        flops_per_token: forward and backward FLOPs for one token.
    """

    tokens: int
    flops_per_token: float


@value(frozen=True, slots=True)
class TrainingJob:
    """A task and the adapter its client starts from."""

    task: Task
    adapter: Adapter


@value(frozen=True, slots=True)
class TrainingResult:
    """What local training gives: the trained adapter and what the client reports of it."""

    adapter: Adapter
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class ClientTrainer(Protocol):
    """Trains clients. A result depends on the job alone, never on when it is computed."""

    def work(self, task: Task) -> TaskWork:
        """Return what the task will cost, without computing it."""
        ...

    def train(self, jobs: Sequence[TrainingJob]) -> Sequence[TrainingResult]:
        """Return one result a job, in order. Jobs may be computed together."""
        ...


class Pending(Protocol):
    """Results on their way."""

    def results(self) -> Sequence[TrainingResult]:
        """Wait for the results, one a job, in order."""
        ...


@runtime_checkable
class BackgroundTrainer(ClientTrainer, Protocol):
    """A trainer that computes elsewhere while whoever asked goes on."""

    def submit(self, jobs: Sequence[TrainingJob]) -> Pending:
        """Begin to compute jobs together, after those submitted before, and return at once."""
        ...


@runtime_checkable
class TakesNotes(Protocol):
    """Whoever meets something that a run's record should say."""

    def take_notes(self) -> Sequence[str]:
        """Return what has happened since last asked, in words."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A score on held-out data.

    Attributes:
        loss: mean cross-entropy per scored token (or per example for a classifier), in nats.
        score: exact match or accuracy in [0, 1]; None when not asked for.
        num_examples: examples scored.
    """

    loss: float
    score: float | None
    num_examples: int


class Evaluator(Protocol):
    """Scores adapters on data no client trains on."""

    def evaluate(self, adapter: Adapter, *, with_score: bool) -> Evaluation:
        """Score an adapter on the common evaluation set."""
        ...

    def evaluate_clients(
        self, adapter: Adapter, *, with_score: bool = False
    ) -> Mapping[int, Evaluation]:
        """Score an adapter on each client's own held-out slice."""
        ...


class Calibrator(Protocol):
    """Looks at adapters through the server's calibration mini-batch."""

    @property
    def tokens(self) -> int:
        """Tokens (padding included) in the calibration mini-batch."""
        ...

    def loss(self, adapter: Adapter) -> float:
        """Return the mean loss on the calibration mini-batch, in nats."""
        ...

    def inputs(self, adapter: Adapter) -> Mapping[str, Tensor]:
        """Return the inputs of each adapted module, by name, shape ``(positions, in_dim)``."""
        ...

    def features(self, adapter: Adapter) -> Tensor:
        """Return penultimate features, shape ``(positions, hidden_dim)``."""
        ...


@value(frozen=True, slots=True)
class BufferedUpdate:
    """An accepted upload waiting for its flush, without its adapter: a rule keeps what it needs.

    Attributes:
        task_id: the task it answers.
        client_id: who sent it.
        base_version: the server version its client started from.
        num_examples: training examples it was computed from.
        norm: Euclidean norm of ``adapter - base``, factor by factor.
        uploads: this client's accepted uploads so far, this one included.
        staleness: server versions passed since its base. Only a flush makes a version, so what
            holds at the arrival holds at the flush.
        size_bytes: bytes of the adapter and its base.
    """

    task_id: int
    client_id: int
    base_version: int
    num_examples: int
    norm: float
    uploads: int
    staleness: int
    size_bytes: int


class LoraRule(Protocol):
    """How factors combine, independent of when updates arrive."""

    name: str

    def combine(self, current: Adapter, terms: Sequence[tuple[float, Adapter, Adapter]]) -> Adapter:
        """Return ``current + sum_j c_j (update_j - base_j)`` in this rule's space.

        Args:
            current: the adapter to move; the result has its layout.
            terms: ``(c_j, update_j, base_j)``.
        """
        ...

    def add(
        self, total: Any, coefficient: float, update: Adapter, base: Adapter, base_version: int
    ) -> Any:
        """Return ``total`` with ``coefficient * (update - base)`` added, for ``move`` to use.

        A rule whose sums are separable adds at once and forgets the update.

        Args:
            total: what this returned for the update before, changed in place and not to be used
                again; None begins a sum.
            coefficient: the weight, up to a factor common to all.
            update: a client's adapter.
            base: where it started.
            base_version: names the base: equal numbers within a sum mean equal adapters.
        """
        ...

    def move(self, current: Adapter, total: Any, scale: float) -> Adapter:
        """Return ``current + scale * total``; a total of None is zero. It uses the total up."""
        ...


@dataclass(frozen=True, slots=True)
class Flush:
    """All a rule may look at when the buffer is applied.

    Attributes:
        version: the current server version (the result becomes ``version + 1``).
        adapter: its adapter.
        updates: what is known of the buffered updates, in order of arrival.
        mean_uploads: accepted uploads per client, averaged over the clients seen so far.
        clients: number of clients that have ever joined.
        lora: how factors combine.
        calibrator: the calibration mini-batch, or None where the server holds none.
    """

    version: int
    adapter: Adapter
    updates: tuple[BufferedUpdate, ...]
    mean_uploads: float
    clients: int
    lora: LoraRule
    calibrator: Calibrator | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What a rule makes of a flush.

    Attributes:
        adapter: the next server version's adapter.
        weights: coefficient of each buffered update, in order.
        notes: what to record, for example calibration loss before and after.
        work: size of the server's work.
        cuts: what each update's coefficient was multiplied by for being too long or for
            contradicting the others, in order; empty: nothing was cut.
    """

    adapter: Adapter
    weights: tuple[float, ...]
    notes: Mapping[str, float] = field(default_factory=dict)
    work: ServerWork = ServerWork()
    cuts: tuple[float, ...] = ()

    def refused(self, adapter: Adapter) -> Step:
        """Return a step that leaves ``adapter`` as it is, with a note that says so."""
        notes = {name: value for name, value in self.notes.items() if math.isfinite(value)}
        weights = tuple(0.0 for _ in self.weights)
        return Step(adapter, weights, {**notes, "step_refused": 1.0}, self.work)


class Scheduler(Protocol):
    """Assigns local steps and says when to flush; a schedule is changed in place by its owner.

    The coordinator owns it and checkpoints keep it, so it is made of dataclasses, containers and
    numbers.
    """

    def begin(self) -> Any:
        """Return the schedule before the first task."""
        ...

    def assign(self, schedule: Any, task_id: int, client_id: int, now_s: float) -> int:
        """Return the local steps of a task that is dispatched now."""
        ...

    def line_up(self, schedule: Any, idle: Sequence[int], free: int) -> tuple[list[int], list[int]]:
        """Return idle clients in the order in which they get work, and those who are to wait."""
        ...

    def settle(
        self, schedule: Any, in_flight: Container[int], accepted: Container[int], now_s: float
    ) -> bool:
        """Note which tasks have ended; return whether the buffer is to be applied."""
        ...

    def due_s(self, schedule: Any) -> float:
        """Return when ``settle`` must be asked again at the latest."""
        ...


def scheduler_of(rule: AggregationRule) -> Scheduler | None:
    """Return a rule's scheduler; most have none, and buffers are applied by their size."""
    scheduler: Scheduler | None = getattr(rule, "scheduler", None)
    return scheduler


WorkAhead: TypeAlias = Callable[[Any, Adapter, LoraRule, Calibrator | None], None]
"""Called with what the rule's ``receive`` returned last, the adapter that the flush will move, how
factors combine, and what the flush will have to measure losses with."""


def ahead_of(rule: AggregationRule) -> WorkAhead | None:
    """Return what a rule does on an upload's arrival that need not wait for the flush.

    Such a rule has a method ``ahead(gathered, current, lora, calibrator)``, which changes what is
    gathered in place. It saves the flush time and changes its result by rounding at most. Most
    rules have nothing to do.
    """
    ahead: WorkAhead | None = getattr(rule, "ahead", None)
    return ahead


class AggregationRule(Protocol):
    """Three functions without a memory of their own: state in, state out.

    A rule may bring a ``scheduler`` (see ``Scheduler``), work ``ahead`` of its flush (see
    ``ahead_of``) and a ``proximal_mu`` for local training.

    ``state`` lives from flush to flush. What is gathered lives from one flush to the next and
    holds the buffered adapters, or their sum, in whatever form the rule wants them; both are
    checkpointed, so they are made of dataclasses, containers, adapters, tensors and numbers.
    """

    name: str
    synchronous: bool

    def init(self, adapter: Adapter) -> Any:
        """Return the rule's state before the first flush (a dataclass of adapters and numbers)."""
        ...

    def receive(
        self, gathered: Any, entry: BufferedUpdate, update: Adapter, base: Adapter, lora: LoraRule
    ) -> Any:
        """Take one accepted upload in as it arrives; return what is gathered so far.

        Args:
            gathered: what this returned for the upload before, which may be changed in place; None
                at the first upload after a flush.
            entry: what is known of the upload.
            update: its adapter.
            base: the adapter of its base version.
            lora: how factors combine.
        """
        ...

    def apply(self, state: Any, gathered: Any, flush: Flush) -> tuple[Any, Step]:
        """Return the next state and the server step; what was gathered is used up."""
        ...


class Journal(Protocol):
    """The durable record of a run."""

    def record(self, event: Event, instructions: Sequence[Instruction]) -> None:
        """Append an event and the instructions it led to."""
        ...

    def record_cohort(self, time_s: float, task_ids: Sequence[int]) -> None:
        """Append which tasks were computed together."""
        ...


__all__ = [
    "AggregationRule",
    "BufferedUpdate",
    "Calibrator",
    "ClientTrainer",
    "Evaluation",
    "Evaluator",
    "Flush",
    "Journal",
    "LoraRule",
    "Scheduler",
    "Step",
    "TaskWork",
    "TrainingJob",
    "TrainingResult",
    "WorkAhead",
    "ahead_of",
    "scheduler_of",
]

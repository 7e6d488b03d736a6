"""What a run tells whoever watches it. Values only; how they are shown is the watcher's affair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Limits:
    """The stop conditions that say how far a run has come; None where there is none."""

    virtual_time_s: float | None = None
    uploads: int | None = None
    versions: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is known when a run starts.

    Attributes:
        name: the recipe's name.
        directory: where the run is kept.
        strategy: aggregation rule.
        lora: how LoRA factors combine.
        model: the base model, for people.
        base_parameters: elements of the frozen base.
        adapter_parameters: elements that are trained.
        fleet: the fleet, for people.
        clients: number of clients.
        concurrency: tasks in flight at most.
        buffer_size: uploads a flush.
        limits: stop conditions.
        resumed: whether it goes on from an earlier part.
        warnings: damage that was met and passed over, in words.
        clock: what the run's seconds are called; a deployed run's are real.
    """

    name: str
    directory: Path
    strategy: str
    lora: str
    model: str
    base_parameters: int
    adapter_parameters: int
    fleet: str
    clients: int
    concurrency: int
    buffer_size: int
    limits: Limits
    resumed: bool = False
    warnings: tuple[str, ...] = ()
    clock: str = "virtual time"


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """Where a run stands.

    Attributes:
        virtual_time_s: virtual time.
        version: server version.
        uploads: answers received, accepted or refused: what ``Limits.uploads`` counts.
        rejected: those refused.
        in_flight: tasks under way.
        staleness_mean: mean staleness of the uploads applied last (None: none yet).
        loss: latest loss on the common evaluation set, in nats (None: none yet).
        score: latest score in [0, 1] (None: not measured).
        tokens: trained tokens reported: what ``Limits.tokens`` counts.
        notes: what has happened so far that somebody should know, such as a lack of memory.
    """

    virtual_time_s: float
    version: int
    uploads: int
    rejected: int
    in_flight: int
    staleness_mean: float | None = None
    loss: float | None = None
    score: float | None = None
    tokens: float = 0.0
    notes: tuple[str, ...] = ()


class ProgressView(Protocol):
    """Watches a run. Called from the run's own thread; it must return quickly."""

    def started(self, info: RunInfo) -> None:
        """Take note that a run begins or goes on."""
        ...

    def progress(self, snapshot: RunSnapshot) -> None:
        """Take note of where it stands; may be called as often as the run likes."""
        ...

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Take note of ``summary.json``'s content."""
        ...


class SilentView:
    """Shows nothing."""

    def started(self, info: RunInfo) -> None:
        """Show nothing."""

    def progress(self, snapshot: RunSnapshot) -> None:
        """Show nothing."""

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Show nothing."""


def fraction_done(limits: Limits, snapshot: RunSnapshot) -> float | None:
    """Return the share of the nearest stop condition that is used up (None: there is none)."""
    pairs = (
        (snapshot.virtual_time_s, limits.virtual_time_s),
        (snapshot.uploads, limits.uploads),
        (snapshot.version, limits.versions),
        (snapshot.tokens, limits.tokens),
    )
    shares = [reached / limit for reached, limit in pairs if limit]
    return min(1.0, max(shares)) if shares else None

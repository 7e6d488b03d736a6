"""What the driver is to do. Imperative; carried out in the order given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from alignfed.core.adapter import Adapter
from alignfed.core.reasons import RejectReason
from alignfed.core.update import Task
from alignfed.core.value import value


class StopReason(StrEnum):
    """Why a run ended."""

    MAX_TIME = "max_time"
    MAX_UPLOADS = "max_uploads"
    MAX_VERSIONS = "max_versions"
    MAX_TOKENS = "max_tokens"
    TARGET_LOSS = "target_loss"
    PATIENCE = "patience"


@value(frozen=True, slots=True)
class Dispatch:
    """Send a task and the adapter of its base version to its client."""

    task: Task
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Reject:
    """Record that an upload was refused, and why; the run goes on."""

    task_id: int
    client_id: int
    reason: RejectReason
    detail: str


@value(frozen=True, slots=True)
class AppliedUpload:
    """What one upload did in a flush.

    Attributes:
        weight: its coefficient in the server step.
        norm: Euclidean norm of its innovation, factor by factor.
        cut: what the rule multiplied its coefficient by for being too long or for contradicting
            the others (already in ``weight``); 1 where it was left as it was.
    """

    task_id: int
    client_id: int
    base_version: int
    staleness: int
    weight: float
    norm: float
    cut: float = 1.0


@dataclass(frozen=True, slots=True)
class ServerWork:
    """The size of the server's own work, from which a driver may model its duration.

    Attributes:
        bytes_moved: bytes read and written while aggregating.
        calibration_tokens: calibration tokens sent forward through the model.
    """

    bytes_moved: int = 0
    calibration_tokens: int = 0


@value(frozen=True, slots=True)
class Publish:
    """A flush made a new server version.

    Attributes:
        version: the new version.
        adapter: its adapter.
        applied: the uploads in the flush, in order of arrival.
        notes: what the rule wants on record, for example ``calibration_loss_after``.
        work: size of the server's work for this flush.
    """

    version: int
    adapter: Adapter
    applied: tuple[AppliedUpload, ...]
    notes: Mapping[str, float] = field(default_factory=dict)
    work: ServerWork = ServerWork()


@value(frozen=True, slots=True)
class Evaluate:
    """Score a version on the common evaluation set and answer with ``EvaluationFinished``."""

    version: int
    adapter: Adapter


@value(frozen=True, slots=True)
class SetTimer:
    """Answer with ``TimerFired`` at ``at_s``. Earlier timers stay set."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Stop:
    """The run is over; the adapter to keep is that of ``version``."""

    reason: StopReason
    version: int


Instruction: TypeAlias = Dispatch | Reject | Publish | Evaluate | SetTimer | Stop

__all__ = [
    "AppliedUpload",
    "Dispatch",
    "Evaluate",
    "Instruction",
    "Publish",
    "Reject",
    "RejectReason",
    "ServerWork",
    "SetTimer",
    "Stop",
    "StopReason",
]

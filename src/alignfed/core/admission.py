"""What an upload must satisfy before it may be buffered; each refusal has a type and numbers.

The checks run from cheap to dear, and none trusts what the upload says of itself.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field

from alignfed.core.adapter import Adapter, AdapterLayout
from alignfed.core.instructions import RejectReason
from alignfed.core.update import Task, Update


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why an upload was refused, for code and for people."""

    reason: RejectReason
    detail: str


@dataclass(slots=True)
class NormHistory:
    """Norms of the last accepted updates; an upload far above their median is an outlier.

    Where the server assigns local steps, norms are a step's: longer tasks move further.

    Attributes:
        max_ratio: largest accepted multiple of the median.
        min_count: accepted norms needed before any upload is judged.
        recent: the last norms, as they came.
        ordered: the same, from small to large.
    """

    max_ratio: float
    min_count: int = 8
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    ordered: list[float] = field(default_factory=list)

    def add(self, norm: float) -> None:
        """Remember the norm of an accepted update; the oldest is forgotten."""
        recent, ordered = self.recent, self.ordered
        if len(ordered) == recent.maxlen:
            del ordered[bisect_left(ordered, recent[0])]
        recent.append(norm)
        insort(ordered, norm)

    def limit(self) -> float:
        """Return the largest norm that is accepted now (infinity: too few seen to judge)."""
        ordered = self.ordered
        count = len(ordered)
        if count < self.min_count:
            return math.inf
        half = count // 2  # ~half is its mirror: the same one where the count is odd
        return self.max_ratio * ((ordered[half] + ordered[~half]) / 2)


MOST_EXPIRED = 10_000
"""Tasks given up that are remembered one by one; of older ones only up to where they went."""


@dataclass(slots=True)
class ExpiredTasks:
    """Tasks given up, to tell a late upload from a repeated one. Ask only about tasks not awaited.

    Of ids below ``forgotten_below`` it is no longer known which were given up and which answered:
    whatever comes for one is too late.

    Attributes:
        ids: the newest, at most twice ``MOST_EXPIRED``.
        forgotten_below: every id below it counts as given up.
    """

    ids: set[int] = field(default_factory=set)
    forgotten_below: int = 0

    def add(self, task_id: int) -> None:
        """Remember a task that is given up; where there are too many, forget the older half."""
        if task_id < self.forgotten_below:
            return
        self.ids.add(task_id)
        if len(self.ids) > 2 * MOST_EXPIRED:
            newest = sorted(self.ids)[-MOST_EXPIRED:]
            self.ids, self.forgotten_below = set(newest), newest[0]

    def __contains__(self, task_id: object) -> bool:
        """Return whether a task that is not awaited was given up."""
        return task_id in self.ids or (isinstance(task_id, int) and task_id < self.forgotten_below)


def check_origin(
    update: Update,
    *,
    known_client: bool,
    in_flight: Task | None,
    expired: Container[int],
    next_task_id: int,
    server_version: int,
    versions: Container[int],
) -> Rejection | None:
    """Check who sends an upload, for which task and from which base version.

    Args:
        update: the upload.
        known_client: whether the client has ever joined.
        in_flight: the task with the upload's id, if it is still awaited.
        expired: task ids the server has stopped waiting for.
        next_task_id: the first task id not yet given out.
        server_version: the current version.
        versions: the versions whose adapters are still held.
    """
    rejection = check_answer(
        update.task_id,
        update.client_id,
        known_client=known_client,
        in_flight=in_flight,
        expired=expired,
        next_task_id=next_task_id,
    )
    if rejection is not None:
        return rejection
    assert in_flight is not None
    if update.base_version > server_version:
        return Rejection(
            RejectReason.FUTURE_VERSION,
            f"base_version={update.base_version} is newer than server_version={server_version}",
        )
    if update.base_version not in versions:
        return Rejection(
            RejectReason.EVICTED_VERSION,
            f"base_version={update.base_version} is no longer held"
            f" (server_version={server_version})",
        )
    if update.base_version != in_flight.base_version:
        return Rejection(
            RejectReason.WRONG_VERSION,
            f"base_version={update.base_version}, but task {update.task_id} was dispatched"
            f" with version {in_flight.base_version}",
        )
    return None


def check_answer(
    task_id: int,
    client_id: int,
    *,
    known_client: bool,
    in_flight: Task | None,
    expired: Container[int],
    next_task_id: int,
) -> Rejection | None:
    """Check that a client may answer a task, before its answer is looked into; see above."""
    if not known_client:
        return Rejection(
            RejectReason.UNKNOWN_CLIENT, f"client {client_id} has never joined this run"
        )
    if in_flight is None:
        return _not_awaited(task_id, expired, next_task_id)
    if in_flight.client_id != client_id:
        return Rejection(
            RejectReason.WRONG_CLIENT,
            f"task {task_id} was given to client {in_flight.client_id}, not to client {client_id}",
        )
    return None


def check_shape(adapter: Adapter, expected: AdapterLayout) -> Rejection | None:
    """Check what an upload holds before its numbers are read: names, shapes, dtypes."""
    # Layouts made in this process are mostly one object: see Adapter.pack.
    if adapter.layout is not expected and adapter.layout != expected:
        return _wrong_layout(adapter.layout, expected)
    # An adapter built by hand may claim a layout that its buffers do not have.
    for dtype, size in expected.sizes.items():
        buffer = adapter.buffers.get(dtype)
        if buffer is None or buffer.dtype is not dtype:
            return Rejection(RejectReason.WRONG_DTYPE, f"no {dtype} buffer of {size} elements")
        if buffer.shape != (size,):
            found = tuple(buffer.shape)
            return Rejection(
                RejectReason.WRONG_SHAPE, f"{dtype} buffer is {found}, expected ({size},)"
            )
    return None


def check_numbers(
    update: Update, update_norm: float, history: NormHistory, steps: int | None = None
) -> Rejection | None:
    """Check the count of examples, that all is finite, and the norm against those before it.

    Args:
        update: an upload of the right shape.
        update_norm: its distance from its base; finite only if every element is.
        history: norms accepted lately.
        steps: local steps that the server assigned, if it did.
    """
    count = update.num_examples
    if type(count) is not int or count < 1:
        return Rejection(
            RejectReason.NO_EXAMPLES,
            f"num_examples={count!r}, must be a whole number of at least 1",
        )
    # A finite adapter may be too far away to be squared: only then are its elements looked at.
    if not math.isfinite(update_norm) and not update.adapter.is_finite():
        return Rejection(RejectReason.NOT_FINITE, "the adapter holds NaN or infinite elements")
    for name, value in update.metrics.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return Rejection(RejectReason.NOT_FINITE, f"metric {name!r} is {value!r}")
    limit = history.limit() * (steps or 1)
    if update_norm <= limit and update_norm < math.inf:
        return None
    return Rejection(
        RejectReason.OUTLYING_NORM,
        f"norm={update_norm:.4g} exceeds {limit:.4g}{f' of {steps} local steps' if steps else ''}"
        f" ({history.max_ratio:g} times the median of the last {len(history.recent)})",
    )


def _not_awaited(task_id: int, expired: Container[int], next_task_id: int) -> Rejection:
    if not isinstance(task_id, int) or not 0 <= task_id < next_task_id:
        return Rejection(RejectReason.UNKNOWN_TASK, f"task {task_id!r} was never given out")
    if task_id in expired:
        return Rejection(
            RejectReason.TASK_EXPIRED, f"task {task_id} came after the server stopped waiting"
        )
    return Rejection(RejectReason.TASK_USED, f"task {task_id} was already answered")


def _wrong_layout(found: AdapterLayout, expected: AdapterLayout) -> Rejection:
    for kind in ("lora", "dense"):
        mine, theirs = dict(getattr(expected, kind)), dict(getattr(found, kind))
        if set(mine) != set(theirs):
            name = sorted(set(mine) ^ set(theirs))[0]
            what = "is missing" if name in mine else "is not part of the model"
            return Rejection(RejectReason.WRONG_NAMES, f"{kind} tensor {name!r} {what}")
        for name, shape in mine.items():
            if shape == theirs[name]:
                continue
            only_dtype = shape.dtype != theirs[name].dtype
            reason = RejectReason.WRONG_DTYPE if only_dtype else RejectReason.WRONG_SHAPE
            return Rejection(reason, f"{name!r} is {theirs[name]}, expected {shape}")
    return Rejection(RejectReason.WRONG_NAMES, "tensors are not in sorted order")

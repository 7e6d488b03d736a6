"""A recorded run handled again, event by event: the way from an incident to its cause.

Nothing is trained, scored or loaded: uploads, scores and the calibrator's answers come from the
record. What is computed again is all that the coordinator decides, and it is held against what it
decided then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from alignfed.config import Recipe, load_recipe
from alignfed.coordinating import make_coordinator
from alignfed.core.coordinator import Coordinator
from alignfed.core.instructions import Publish
from alignfed.core.lora import exchange_of
from alignfed.core.ports import Calibrator
from alignfed.core.state import CoordinatorState
from alignfed.errors import AlignFedError, JournalError
from alignfed.journal import Codec, Recording, rule_state_class, this_platform
from alignfed.journal.answers import RecordedCalibrator
from alignfed.journal.rehandle import Divergence, Rehandled, rehandle
from alignfed.journal.serving import ServerState
from alignfed.simulation.state import CHECKPOINTED, RunState

ELSEWHERE_TOLERANCE = 1e-4
"""Largest relative difference where another machine or torch than the run's computes again."""

Watch = Callable[[Rehandled, int], None]
"""Is given each event once it was handled, and the number of events there are."""


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay found.

    Attributes:
        directory: the run's.
        began_after: the last row of the checkpoint it began from; 0 is the run's beginning.
        events: events handled.
        instructions: instructions that are those on record.
        versions: server versions among them.
        exact: whether all of them are equal to the last bit.
        tolerance: what was allowed; 0 where bits had to be equal.
        divergence: the first thing that is different, if anything.
        warnings: damage that was met and passed over, in words.
    """

    directory: Path
    began_after: int
    events: int
    instructions: int
    versions: int
    exact: bool
    tolerance: float
    divergence: Divergence | None
    warnings: tuple[str, ...]


def replay(
    directory: Path | str, *, tolerance: float | None = None, watch: Watch | None = None
) -> ReplayResult:
    """Handle a run's events again, from its oldest checkpoint on, and compare.

    Args:
        directory: a run's directory, simulated or deployed; it is only read.
        tolerance: largest relative difference of numbers and adapters, 0 for equal bits; None:
            equal bits on the platform of the run, else ``ELSEWHERE_TOLERANCE``.
        watch: is given each event once it was handled; its ``state`` goes on changing.

    Raises:
        JournalError: there is no run, it is damaged, its recipe was changed, or the uploads were
            not kept.
    """
    with Recording(Path(directory)) as recording:
        start = _begin(recording, tolerance)
        events = instructions = versions = 0
        exact, divergence = True, None
        try:
            for one in _steps(recording, start):
                events += 1
                exact = exact and one.exact
                divergence = one.divergence
                if divergence is None:
                    instructions += len(one.instructions)
                    versions += sum(isinstance(item, Publish) for item in one.instructions)
                if watch is not None:
                    watch(one, max(start.total, events))
        except JournalError as error:
            raise JournalError(
                f"{events} of {start.total} events were handled again, and all as on record; then:"
                f" {error}",
                **error.values,
            ) from error
        return ReplayResult(
            recording.directory.root,
            start.began_after,
            events,
            instructions,
            versions,
            exact,
            start.tolerance,
            divergence,
            start.warnings,
        )


def steps(directory: Path | str, *, tolerance: float | None = None) -> Iterator[Rehandled]:
    """Yield each event of a run once it was handled again: the place for a breakpoint.

    Each brings its instructions and the coordinator's state, which the next event will change.
    It ends with the record, or after the first divergence.

    Raises:
        JournalError: as ``replay``.
    """
    with Recording(Path(directory)) as recording:
        yield from _steps(recording, _begin(recording, tolerance))


@dataclass(frozen=True, slots=True)
class _Start:
    coordinator: Coordinator
    state: CoordinatorState
    began_after: int
    total: int
    tolerance: float
    warnings: tuple[str, ...]


def _begin(recording: Recording, tolerance: float | None) -> _Start:
    recipe = _recipe_of(recording)
    if tolerance is None:
        here = recording.facts.platform == this_platform()
        tolerance = 0.0 if here else ELSEWHERE_TOLERANCE
    elif not tolerance >= 0:
        raise AlignFedError(
            f"tolerance is {tolerance}, must be 0 or more; 0 asks for equal bits",
            tolerance=tolerance,
        )
    coordinator = _coordinator(recording, recipe, tolerance)
    codec = Codec(rule_state_class(coordinator.rule), ServerState, *CHECKPOINTED)
    warnings: list[str] = []
    began_after, saved = recording.oldest(codec, warnings)
    total = recording.count_events(began_after)
    return _Start(coordinator, _state_of(saved), began_after, total, tolerance, tuple(warnings))


def _steps(recording: Recording, start: _Start) -> Iterator[Rehandled]:
    with _threads(recording.facts.threads):
        yield from rehandle(
            start.coordinator,
            start.state,
            recording.events(start.began_after),
            recording.adapter,
            tolerance=start.tolerance,
        )


def _recipe_of(recording: Recording) -> Recipe:
    path = recording.directory.recipe
    recipe = load_recipe(path, files_exist=False)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    begun_with = recording.meta["recipe_sha256"]
    if found != begun_with:
        raise JournalError(
            f"{path} is not the recipe the run was begun with (SHA-256 {found[:12]}, not"
            f" {begun_with[:12]}); put it back as it was",
            path=str(path),
        )
    return recipe


def _coordinator(recording: Recording, recipe: Recipe, tolerance: float) -> Coordinator:
    facts = recording.facts
    exchange = exchange_of(recipe.strategy.lora)
    if facts.ranks:
        exchange = exchange.with_ranks(facts.ranks)
    calibrator = None
    if facts.calibration_tokens is not None:
        calibrator = RecordedCalibrator(
            facts.calibration_tokens,
            recording.blobs.tensor,
            lru_cache(maxsize=1)(lambda: _real_calibrator(recipe)),
            exact=tolerance == 0,
        )
    return make_coordinator(recipe, calibrator, exchange)


def _real_calibrator(recipe: Recipe) -> Calibrator:
    """Load model and data after all: the rule asks for tensors that were not kept."""
    from alignfed.build import load

    why = (
        "the rule asks the calibrator for layer inputs or features, which were not recorded; run"
        " with --keep-payloads, or replay where the recipe's model and data are"
    )
    try:
        calibrator = load(recipe).calibrator
    except AlignFedError as error:
        raise JournalError(f"{error}: {why}", **error.values) from error
    if calibrator is None:
        raise JournalError(f"the recipe's data holds no calibration examples: {why}")
    return calibrator


def _state_of(saved: Any) -> CoordinatorState:
    if isinstance(saved, RunState):
        return saved.engine.coordinator
    if isinstance(saved, ServerState):
        return saved.coordinator
    raise JournalError(
        f"the checkpoint holds a {type(saved).__name__}, of which this version of AlignFed knows"
        " no coordinator; replay with the version that began the run"
    )


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Compute with as many threads as the run did: they decide the last bits of long sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)

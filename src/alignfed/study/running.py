"""Runs of a study, carried out or found finished; the same from here on for every study."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from alignfed.errors import AlignFedError
from alignfed.study.bench import (
    DEVICES,
    FACTS,
    RECORD,
    EnvironmentFacts,
    Order,
    load_facts,
)
from alignfed.study.directory import StudyDirectory, digest_of
from alignfed.study.plan import Environment, PlannedRun, run_recipe
from alignfed.study.pool import Pool, PoolView
from alignfed.study.record import RunRecord, load_record


@dataclass(frozen=True, slots=True)
class StudyInfo:
    """What is known when a study starts.

    Attributes:
        name: the recipe's name.
        directory: where it is kept.
        question: what is compared, for people.
        jobs: worker processes.
        total: environments and runs in all.
    """

    name: str
    directory: Path
    question: str
    jobs: int
    total: int


class StudyView(PoolView, Protocol):
    """Watches a study."""

    def started(self, info: StudyInfo) -> None:
        """Take note that a study begins or goes on."""
        ...

    def found(self, count: int) -> None:
        """Take note that so many parts were finished before."""
        ...

    def finished(self, files: Sequence[Path]) -> None:
        """Take note of what was written."""
        ...


class SilentStudyView:
    """Shows nothing."""

    def started(self, info: StudyInfo) -> None:
        """Show nothing."""

    def found(self, count: int) -> None:
        """Show nothing."""

    def began(self, order: Order) -> None:
        """Show nothing."""

    def advanced(self, order: Order, share: float) -> None:
        """Show nothing."""

    def ended(self, order: Order) -> None:
        """Show nothing."""

    def finished(self, files: Sequence[Path]) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class Workshop:
    """Where and by whom a study's runs are done.

    Attributes:
        place: the study's directory.
        pool: the workers.
        view: who watches.
        environments: by key.
    """

    place: StudyDirectory
    pool: Pool
    view: StudyView
    environments: Mapping[str, Environment]

    def prepare(self) -> dict[str, EnvironmentFacts]:
        """Return the facts of every environment; those that are not there yet are made.

        Raises:
            AlignFedError: an environment's recipe asks for what does not exist.
        """
        orders = {}
        for key, environment in self.environments.items():
            text = environment.recipe.to_toml()
            root = self.place.environment(key)
            orders[key] = Order("environment", key, key, text, root, digest_of(text))
        facts = {key: load_facts(one.root / FACTS, one.digest) for key, one in orders.items()}
        missing = [orders[key] for key, one in facts.items() if one is None]
        self.view.found(len(orders) - len(missing))
        self.pool.carry_out(missing, self.view)
        complete = {}
        for key, one in orders.items():
            found = facts[key] or load_facts(one.root / FACTS, one.digest)
            assert found is not None  # the worker wrote it
            complete[key] = found
        return complete

    def do(
        self, runs: Sequence[PlannedRun], facts: Mapping[str, EnvironmentFacts]
    ) -> dict[str, RunRecord]:
        """Return the record of every run, by its key; what is not finished is done now.

        Raises:
            AlignFedError: a run's recipe asks for what does not fit.
        """
        orders = {run.key: self._order(run, facts[run.environment]) for run in runs}
        records = {key: load_record(one.root / RECORD, one.digest) for key, one in orders.items()}
        missing = [orders[key] for key, one in records.items() if one is None]
        self.view.found(len(orders) - len(missing))
        self.pool.carry_out(missing, self.view)
        complete = {}
        for key, one in orders.items():
            found = records[key] or load_record(one.root / RECORD, one.digest)
            assert found is not None  # the worker wrote it
            complete[key] = found
        return complete

    def _order(self, run: PlannedRun, facts: EnvironmentFacts) -> Order:
        environment = self.environments[run.environment]
        trace = (self.place.environment(run.environment) / DEVICES).resolve()
        uploads = environment.recipe.stop.uploads
        assert uploads is not None  # the study was planned
        tokens = max(1, round(run.share * uploads * facts.tokens_per_upload))
        recipe = run_recipe(environment.recipe, run, tokens=tokens, devices=str(trace))
        # A study that is moved to another folder stays what it is.
        text = recipe.to_toml().replace(str(trace), facts.devices_sha256)
        return Order(
            "run",
            run.key,
            run.environment,
            recipe.to_toml(),
            self.place.run(run.key),
            digest_of(text),
            facts.client_ids,
        )


def worker_count(jobs: int | None) -> int:
    """Return how many workers to start: as many as this process may use cores, unless told.

    Raises:
        AlignFedError: fewer than one.
    """
    if jobs is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if jobs < 1:
        raise AlignFedError(f"jobs={jobs}, must be at least 1", jobs=jobs)
    return jobs

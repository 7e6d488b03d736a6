"""``alignfed compare``: rules against each other, each baseline's server step tuned alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignfed.config import Recipe
from alignfed.journal import write_summary, write_text_atomically
from alignfed.study.bench import EnvironmentFacts
from alignfed.study.curves import draw_curves
from alignfed.study.directory import open_study
from alignfed.study.figures import figures_of, target_json
from alignfed.study.measures import RunMeasures, Target, measure
from alignfed.study.plan import (
    Arm,
    Candidates,
    PlannedRun,
    arm_of,
    candidates,
    check_strategies,
    default_strategies,
    environment_of,
    target_of,
    with_seeds,
)
from alignfed.study.pool import Pool
from alignfed.study.record import RunRecord
from alignfed.study.running import (
    SilentStudyView,
    StudyInfo,
    StudyView,
    Workshop,
    worker_count,
)
from alignfed.study.tables import comparison_table


@dataclass(frozen=True, slots=True)
class StudyResult:
    """A finished study.

    Attributes:
        directory: where everything is kept.
        figures: the content of ``comparison.json`` or ``ablation.json``.
        files: what was written for people and programs.
    """

    directory: Path
    figures: Mapping[str, Any]
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Tuned:
    """How a rule's server step was chosen.

    Attributes:
        candidates: what it might try.
        tried: the figures of each, in the same order.
        chosen: place of the best; None: nothing was tuned.
    """

    candidates: Candidates
    tried: Sequence[RunMeasures]
    chosen: int | None

    def as_json(self) -> dict[str, Any]:
        """Return the choice as ``comparison.json`` has it; empty where nothing was tuned."""
        if self.chosen is None:
            return {}
        values = self.candidates.values
        return {
            "setting": self.candidates.setting,
            "value": values[self.chosen],
            "at_edge": values[self.chosen] in (min(values), max(values)),
            "tried": [
                {
                    "value": value,
                    "time_to_target_s": _finite(one.time_to_target_s),
                    "final_eval_loss": _finite(one.final_loss),
                    "final_score": one.final_score,
                }
                for value, one in zip(values, self.tried, strict=True)
            ],
        }


def compare(
    recipe: Recipe,
    directory: Path | str,
    *,
    strategies: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    view: StudyView | None = None,
) -> StudyResult:
    """Compare aggregation rules on a recipe, and write tables and curves.

    Call it below ``if __name__ == "__main__":`` in a script: workers are new processes, which
    import the script again.

    Args:
        recipe: data, model, fleet and amount of work; its ``compare`` section fixes the rest.
        directory: of the study; one that holds part of it already is gone on with.
        strategies: rules to compare; None: the default ones that exist.
        seeds: reported seeds; None: the recipe's.
        jobs: worker processes; None: one for each core.
        view: watches the study.

    Raises:
        RecipeError: an unknown strategy, no target, a tuning seed among those reported.
        JournalError: the directory holds something else.
        KeyboardInterrupt: interrupted; the same call goes on.
    """
    recipe = with_seeds(recipe, seeds)
    names = check_strategies(default_strategies() if strategies is None else strategies)
    target = target_of(recipe)
    workers, view, section = worker_count(jobs), view or SilentStudyView(), recipe.compare
    choices = {name: candidates(recipe, name) for name in names}
    reported = {seed: environment_of(recipe, seed) for seed in section.seeds}
    tuning = environment_of(recipe, section.tuning_seed)
    environments = {one.key: one for one in reported.values()}
    if any(one.setting for one in choices.values()):
        environments = {tuning.key: tuning, **environments}
    trials = {
        name: [
            PlannedRun(
                f"{name}/tuning-{value:g}",
                tuning.key,
                arm_of(recipe, name).with_settings(**{choice.setting: value}),
                section.tuning_share,
                "score",
            )
            for value in choice.values
        ]
        for name, choice in choices.items()
        if choice.setting is not None
    }
    place, lock = open_study(Path(directory), "compare", recipe)
    try:
        with Pool(workers) as pool:
            total = len(environments) + sum(map(len, trials.values())) + len(names) * len(reported)
            question = f"{', '.join(names)} on seeds {', '.join(map(str, section.seeds))}"
            view.started(StudyInfo(recipe.name, place.root, question, workers, total))
            workshop = Workshop(place, pool, view, environments)
            facts = workshop.prepare()
            untuned = _reported(names, reported, {n: arm_of(recipe, n) for n in names}, set(trials))
            first = [run for runs in trials.values() for run in runs] + untuned
            records = workshop.do(first, facts)
            tuned = {
                name: _choose(recipe, choices[name], trials.get(name, ()), records, facts, target)
                for name in names
            }
            arms = {name: _arm(recipe, name, tuned[name]) for name in names}
            records |= workshop.do(
                _reported(names, reported, arms, set(names) - set(trials)), facts
            )
        figures = _figures(recipe, names, target, tuned, arms, records, facts)
        files = _write(place.root, figures)
    finally:
        lock.release()
    view.finished(files)
    return StudyResult(place.root, figures, files)


def _reported(
    names: Sequence[str],
    environments: Mapping[int, Any],
    arms: Mapping[str, Arm],
    without: set[str],
) -> list[PlannedRun]:
    return [
        PlannedRun(f"{name}/seed-{seed}", environment.key, arms[name])
        for seed, environment in environments.items()
        for name in names
        if name not in without
    ]


def _arm(recipe: Recipe, name: str, tuned: Tuned) -> Arm:
    arm = arm_of(recipe, name)
    if tuned.chosen is None or tuned.candidates.setting is None:
        return arm
    return arm.with_settings(**{tuned.candidates.setting: tuned.candidates.values[tuned.chosen]})


def _choose(
    recipe: Recipe,
    choice: Candidates,
    trials: Sequence[PlannedRun],
    records: Mapping[str, RunRecord],
    facts: Mapping[str, EnvironmentFacts],
    target: Target,
) -> Tuned:
    section = recipe.compare
    tried = [
        measure(
            records[run.key],
            target,
            finals=section.final_evaluations,
            slow_clients=facts[run.environment].slow_clients,
        )
        for run in trials
    ]
    if not tried:
        return Tuned(choice, (), None)
    return Tuned(choice, tried, best_step(tried, section.tuning_measure))


def best_step(tried: Sequence[RunMeasures], by: str) -> int:
    """Return the place of the best trial by a measure, the other breaking ties, then the first."""

    def rank(place: int) -> tuple[float, float]:
        one = tried[place]
        loss = math.inf if math.isnan(one.final_loss) else one.final_loss
        pair = (one.time_to_target_s, loss)
        return pair if by == "time_to_target" else (pair[1], pair[0])

    return min(range(len(tried)), key=rank)


def _figures(
    recipe: Recipe,
    names: Sequence[str],
    target: Target,
    tuned: Mapping[str, Tuned],
    arms: Mapping[str, Arm],
    records: Mapping[str, RunRecord],
    facts: Mapping[str, EnvironmentFacts],
) -> dict[str, Any]:
    section = recipe.compare
    strategies = {}
    for name in names:
        keys = [(f"{name}/seed-{seed}", f"seed-{seed}") for seed in section.seeds]
        strategies[name] = {
            **figures_of(
                [records[run] for run, _ in keys],
                [facts[environment] for _, environment in keys],
                section.seeds,
                target,
                section.final_evaluations,
            ),
            "settings": dict(arms[name].settings),
            "local_steps": arms[name].local_steps,
            "tuned": tuned[name].as_json(),
        }
    return {
        "format": 1,
        "target": target_json(target),
        "recipe": recipe.name,
        "scorer": recipe.evaluation.scorer,
        "seeds": list(section.seeds),
        "tuning": {
            "seed": section.tuning_seed,
            "trials": len(section.tuning_factors),
            "share_of_work": section.tuning_share,
            "measure": section.tuning_measure,
        },
        "uploads": recipe.stop.uploads,
        "in_flight": recipe.server.concurrency,
        "buffer_size": recipe.server.buffer_size,
        "final_evaluations": section.final_evaluations,
        "slow_clients": {
            str(seed): list(facts[f"seed-{seed}"].slow_clients) for seed in section.seeds
        },
        "strategies": strategies,
    }


def _write(root: Path, figures: Mapping[str, Any]) -> tuple[Path, ...]:
    result, table = root / "comparison.json", root / "comparison.md"
    write_summary(result, figures)
    write_text_atomically(table, comparison_table(figures))
    return (result, table, *draw_curves(root, figures))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

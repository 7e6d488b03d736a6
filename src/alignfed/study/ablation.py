"""``alignfed ablate``: the method with each module off in turn, by staleness and skew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignfed.config import Recipe
from alignfed.core.aggregation import RULES
from alignfed.errors import RecipeError
from alignfed.journal import write_summary, write_text_atomically
from alignfed.study.comparison import StudyResult
from alignfed.study.directory import open_study
from alignfed.study.figures import figures_of, target_json
from alignfed.study.plan import (
    METHOD,
    Arm,
    Environment,
    PlannedRun,
    arm_of,
    environment_of,
    target_of,
    with_seeds,
)
from alignfed.study.pool import Pool
from alignfed.study.running import (
    SilentStudyView,
    StudyInfo,
    StudyView,
    Workshop,
    worker_count,
)
from alignfed.study.tables import ablation_table

FULL = "full"
"""The variant with every module on."""

PARTS = {
    "freshness": "freshness_decay",
    "participation": "participation_exponent",
    "lengths": "length_exponent",
}
"""What ``fairness`` weighs by, and the number that leaves it out by being 0."""


@dataclass(frozen=True, slots=True)
class Regime:
    """How stale and how skewed.

    Attributes:
        in_flight: tasks in flight.
        buffer_size: uploads a flush.
        alpha: concentration of the Dirichlet deal.
    """

    in_flight: int
    buffer_size: int
    alpha: float

    @property
    def key(self) -> str:
        """Its folder."""
        return f"in-flight-{self.in_flight}-buffer-{self.buffer_size}-alpha-{self.alpha:g}"


def variants(own: Arm) -> dict[str, Arm]:
    """Return the method with each module off in turn, by the variant's name, the full one first.

    A module that ``own`` or the method's defaults leave off, by its switch or by a number, is not
    there to be switched off; nor is a part of fairness that is all of it.
    """
    known = {one.name: one.default for one in RULES[METHOD].settings}
    values = {**known, **own.settings}
    parts, idle = [], set()
    if values["variant"] == "default":  # the paper's knows none of these numbers
        parts = [part for part, name in PARTS.items() if values[name]]
        if not parts:
            idle.add("fairness")
        if values["deviation_keep"] == 1:
            idle.add("grouping")
    found = {FULL: own}
    for name, value in known.items():
        if isinstance(value, bool) and values[name] is True and name not in idle:
            found[f"without {name}"] = own.with_settings(**{name: False})
    if values["fairness"] and len(parts) > 1:
        found |= {f"without {part}": own.with_settings(**{PARTS[part]: 0.0}) for part in parts}
    if own.local_steps != "equal":
        found["without local steps by speed"] = replace(own, local_steps="equal")
    return found


def ablate(
    recipe: Recipe,
    directory: Path | str,
    *,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    view: StudyView | None = None,
) -> StudyResult:
    """Run the method with each module off in turn, at every staleness level and skew.

    Call it below ``if __name__ == "__main__":`` in a script, as ``compare``.

    Args:
        recipe: data, model, fleet and amount of work; its ``ablate`` section names the regimes.
        directory: of the study; one that holds part of it already is gone on with.
        seeds: seeds to average over; None: those of the recipe's ``compare`` section.
        jobs: worker processes; None: one for each core.
        view: watches the study.

    Raises:
        RecipeError: no target, or data that are not dealt by Dirichlet shares.
        JournalError: the directory holds something else.
        KeyboardInterrupt: interrupted; the same call goes on.
    """
    recipe = with_seeds(recipe, seeds)
    target, workers, view = target_of(recipe), worker_count(jobs), view or SilentStudyView()
    if recipe.data.partition.kind != "dirichlet":
        raise RecipeError(
            f'recipe {recipe.name!r} deals its data by "{recipe.data.partition.kind}"; an ablation'
            " sets the skew by Dirichlet shares of a column: set data.partition.kind and column"
        )
    section, all_seeds = recipe.ablate, recipe.compare.seeds
    levels = zip(section.in_flight, section.buffers, strict=True)
    regimes = [Regime(*level, alpha) for level in levels for alpha in section.alphas]
    own = arm_of(recipe, METHOD)
    off = variants(own)
    environments = {
        (alpha, seed): _environment(recipe, alpha, seed)
        for alpha in section.alphas
        for seed in all_seeds
    }
    runs = [
        PlannedRun(
            _run_key(regime, name, seed),
            environments[regime.alpha, seed].key,
            _arm(arm, regime, name),
        )
        for regime in regimes
        for seed in all_seeds
        for name, arm in off.items()
    ]
    place, lock = open_study(Path(directory), "ablate", recipe)
    try:
        with Pool(workers) as pool:
            question = (
                f"{METHOD} and {len(off) - 1} variants in {len(regimes)} regimes on seeds"
                f" {', '.join(map(str, all_seeds))}"
            )
            total = len(environments) + len(runs)
            view.started(StudyInfo(recipe.name, place.root, question, workers, total))
            by_key = {one.key: one for one in environments.values()}
            workshop = Workshop(place, pool, view, by_key)
            facts = workshop.prepare()
            records = workshop.do(runs, facts)
        figures: dict[str, Any] = {
            "format": 1,
            "target": target_json(target),
            "recipe": recipe.name,
            "scorer": recipe.evaluation.scorer,
            "seeds": list(all_seeds),
            "uploads": recipe.stop.uploads,
            "clients": section.clients,
            "final_evaluations": recipe.compare.final_evaluations,
            "regimes": [],
        }
        for regime in regimes:
            found = {}
            for name, arm in off.items():
                row = figures_of(
                    [records[_run_key(regime, name, seed)] for seed in all_seeds],
                    [facts[environments[regime.alpha, seed].key] for seed in all_seeds],
                    all_seeds,
                    target,
                    recipe.compare.final_evaluations,
                )
                del row["curves"]  # nobody draws them, and they are most of the file
                steps = {"local_steps": arm.local_steps}
                found[name] = {**row, "settings": dict(arm.settings), **steps}
            figures["regimes"].append(
                {
                    "in_flight": regime.in_flight,
                    "buffer_size": regime.buffer_size,
                    "alpha": regime.alpha,
                    "variants": found,
                }
            )
        files = (place.root / "ablation.json", place.root / "ablation.md")
        write_summary(files[0], figures)
        write_text_atomically(files[1], ablation_table(figures))
    finally:
        lock.release()
    view.finished(files)
    return StudyResult(place.root, figures, files)


def _environment(recipe: Recipe, alpha: float, seed: int) -> Environment:
    section = recipe.ablate
    partition = recipe.data.partition.model_copy(
        update={"num_clients": section.clients, "alpha": alpha, "min_size": section.min_size}
    )
    data = recipe.data.model_copy(update={"partition": partition})
    found = environment_of(recipe.model_copy(update={"data": data}), seed)
    return replace(found, key=f"alpha-{alpha:g}-{found.key}")


def _arm(arm: Arm, regime: Regime, name: str) -> Arm:
    return replace(
        arm,
        name=name,
        concurrency=regime.in_flight,
        buffer_size=regime.buffer_size,
    )


def _run_key(regime: Regime, variant: str, seed: int) -> str:
    return f"{regime.key}/{variant.replace(' ', '-')}/seed-{seed}"

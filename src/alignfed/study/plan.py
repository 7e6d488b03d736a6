"""Which runs make up a study, and their recipes. Pure: recipes in, recipes out; nothing is run."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignfed.config import (
    AblateSection,
    CompareSection,
    FleetSection,
    Recipe,
    StopSection,
    make_recipe,
)
from alignfed.core.aggregation import RULES, make_rule
from alignfed.errors import RecipeError, RuleError
from alignfed.study.measures import Target
from alignfed.training.naming import nearest_name

DEFAULT_STRATEGIES = ("alignfed", "fedbuff", "fedasync", "ca2fl", "fedavg", "fedadam")
"""What is compared unless somebody says otherwise; of these, what the table of rules has."""

METHOD = "alignfed"
"""The rule whose constants are frozen: it runs as the recipe sets it, or by its defaults."""

STEPS = ("equal", "by_speed")
"""What may follow a rule's name and a plus: values of ``strategy.local_steps``."""

STEP_SETTINGS = ("server_step", "server_lr", "mixing")
"""What rules call the setting that scales their server step; a rule has one of these at most."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What all runs of one seed share: data, initial adapter, devices.

    Attributes:
        key: name within the study, for example ``seed-0``.
        recipe: a recipe whose seed, data and fleet are the environment's.
    """

    key: str
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run: a rule with settings, at a level of concurrency.

    Attributes:
        name: how the study calls it.
        rule: the aggregation rule.
        settings: its settings; others are its defaults.
        concurrency: tasks in flight.
        buffer_size: uploads a flush.
        local_steps: who decides how many a task takes, as the recipe's key of that name.
    """

    name: str
    rule: str
    settings: Mapping[str, Any]
    concurrency: int
    buffer_size: int
    local_steps: str = "auto"

    def with_settings(self, **settings: Any) -> Arm:
        """Return the same arm with some settings replaced."""
        return replace(self, settings={**self.settings, **settings})


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        key: name within the study and folder, for example ``fedbuff/seed-0``.
        environment: key of its environment.
        arm: what is run.
        share: its client work, as a share of a whole run's.
        measure: what its evaluations measure, as the recipe's key of that name.
    """

    key: str
    environment: str
    arm: Arm
    share: float = 1.0
    measure: str = "clients"


@dataclass(frozen=True, slots=True)
class Candidates:
    """The server steps a rule may try: ``setting`` is its name there (None: it has no step)."""

    setting: str | None
    values: tuple[float, ...] = ()


def target_of(recipe: Recipe) -> Target:
    """Return the target that the recipe fixes.

    Raises:
        RecipeError: it fixes none, or does not say how much work a run is.
    """
    section = recipe.compare
    if recipe.stop.uploads is None:
        raise RecipeError(
            f"recipe {recipe.name!r} sets no stop.uploads; every rule gets the client work of that"
            " many uploads, so a study needs it (--set stop.uploads=240)"
        )
    if section.target_score is not None:
        if recipe.evaluation.scorer == "none":
            raise RecipeError(
                f"compare.target_score = {section.target_score} needs a score, but"
                ' evaluation.scorer is "none"; name a scorer, or set compare.target_loss and unset'
                " the score",
                target_score=section.target_score,
            )
        return Target("score", section.target_score)
    if section.target_loss is not None:
        return Target("loss", section.target_loss)
    raise RecipeError(
        f"recipe {recipe.name!r} fixes no target, and one chosen later would prove nothing;"
        " set compare.target_score or compare.target_loss in the recipe"
    )


def rule_of(strategy: str) -> str:
    """Return a strategy's rule.

    >>> rule_of("fedbuff"), rule_of("fedbuff+by_speed")
    ('fedbuff', 'fedbuff')
    """
    return strategy.partition("+")[0]


def check_strategies(names: Sequence[str]) -> tuple[str, ...]:
    """Return the strategies to compare: rules, each perhaps with who decides on local steps.

    Raises:
        RecipeError: none, an unknown one, or one that is named twice.
    """
    for name in names:
        rule, plus, steps = name.partition("+")
        if plus and steps not in STEPS:
            raise RecipeError(
                f"strategy {name!r} ends in {steps!r}; after the + comes one of {', '.join(STEPS)}",
                strategy=name,
            )
        if rule not in RULES:
            near = nearest_name(rule, RULES)
            raise RecipeError(
                f"strategy {name!r} does not exist{near}; `alignfed strategies` lists"
                f" {', '.join(RULES)}",
                strategy=name,
            )
        if names.count(name) > 1:
            raise RecipeError(f"strategy {name!r} is named twice; name each once", strategy=name)
    if not names:
        raise RecipeError(
            "no strategies to compare; name some, as in --strategies alignfed,fedbuff"
        )
    return tuple(names)


def default_strategies() -> tuple[str, ...]:
    """Return those of the default strategies that the table of rules has."""
    return tuple(name for name in DEFAULT_STRATEGIES if name in RULES)


def with_seeds(recipe: Recipe, seeds: Sequence[int] | None) -> Recipe:
    """Return a recipe that reports these seeds; None leaves its own.

    Raises:
        RecipeError: the seeds do not fit, for example hold the tuning seed.
    """
    if seeds is None:
        return recipe
    document = tomllib.loads(recipe.to_toml())
    document["compare"]["seeds"] = list(seeds)
    return make_recipe(document)


def candidates(recipe: Recipe, strategy: str) -> Candidates:
    """Return the server steps a baseline may try: as many for every rule that has a step.

    Raises:
        RecipeError: the recipe names steps that the rule does not accept.
    """
    section, rule = recipe.compare, rule_of(strategy)
    own = [one for one in RULES[rule].settings if one.name in STEP_SETTINGS]
    if not own or rule == METHOD:
        return Candidates(None)
    setting, default = own[0].name, float(own[0].default)
    if rule in section.steps:
        values: tuple[float, ...] = section.steps[rule]
        for value in values:
            try:
                make_rule(rule, **{setting: value})
            except RuleError as error:
                raise RecipeError(f"compare.steps.{rule}: {error}", rule=rule) from error
        return Candidates(setting, values)
    factors = sorted(section.tuning_factors)
    unit = min(default, own[0].high / factors[-1])
    return Candidates(setting, tuple(factor * unit for factor in factors))


def arm_of(recipe: Recipe, strategy: str) -> Arm:
    """Return a strategy as the recipe sets it; another rule than the recipe's has its defaults."""
    rule, _, steps = strategy.partition("+")
    own = recipe.strategy.settings if recipe.strategy.rule == rule else {}
    server, steps = recipe.server, steps or recipe.strategy.local_steps
    return Arm(strategy, rule, own, server.concurrency, server.buffer_size, steps)


def environment_of(recipe: Recipe, seed: int) -> Environment:
    """Return what the recipe's runs of a seed share."""
    return Environment(f"seed-{seed}", recipe.model_copy(update={"seed": seed}))


def run_recipe(recipe: Recipe, run: PlannedRun, *, tokens: int, devices: str) -> Recipe:
    """Return the recipe of one run: its environment's, with the run's rule and amount of work.

    Args:
        recipe: the environment's.
        run: what to run.
        tokens: client work at which it stops.
        devices: the recorded device trace to replay.

    Raises:
        RecipeError: the rule does not fit the recipe.
    """
    arm, section = run.arm, recipe.compare
    synchronous = RULES[arm.rule].synchronous
    every = section.evaluate_every_uploads or arm.buffer_size
    server: dict[str, Any] = {"concurrency": arm.concurrency, "buffer_size": arm.buffer_size}
    if synchronous and not RULES[recipe.strategy.rule].synchronous:
        # An asynchronous buffer's age is no limit for a round.
        server["flush_timeout_s"] = None
    changed = recipe.model_copy(
        update={
            "name": run.key.replace("/", "-").replace("+", "-"),
            "strategy": recipe.strategy.model_copy(
                update={
                    "rule": arm.rule,
                    "settings": dict(arm.settings),
                    "local_steps": arm.local_steps,
                }
            ),
            "server": recipe.server.model_copy(update=server),
            "fleet": FleetSection(replay=devices),
            "stop": StopSection(tokens=tokens),
            "evaluation": recipe.evaluation.model_copy(
                update={
                    "every_versions": versions_between(
                        every, arm.concurrency if synchronous else arm.buffer_size
                    ),
                    "measure": run.measure,
                    "per_client": False,
                }
            ),
            "compare": CompareSection(),
            "ablate": AblateSection(),
        }
    )
    return make_recipe(tomllib.loads(changed.to_toml()))


def versions_between(uploads: int, uploads_a_version: int) -> int:
    """Return how many versions to publish between evaluations, to evaluate every so many uploads.

    >>> versions_between(4, 4), versions_between(8, 4), versions_between(4, 8)
    (1, 2, 1)
    """
    return max(1, round(uploads / uploads_a_version))

"""A whole recipe, and what its sections ask of each other."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import model_validator

from alignfed.config.compare import AblateSection, CompareSection
from alignfed.config.data import DataSection
from alignfed.config.deploy import DeploySection
from alignfed.config.document import write_recipe
from alignfed.config.fleet import FleetSection
from alignfed.config.model import LoraSection, ModelSection
from alignfed.config.run import (
    EvaluationSection,
    ServerSection,
    StopSection,
    StrategySection,
    TrainingSection,
)
from alignfed.config.section import BUILTIN, Section, UnfitError, key, table
from alignfed.config.words import joined, toml_text
from alignfed.core.local_steps import StepsBySpeed
from alignfed.errors import RuleError
from alignfed.training.naming import nearest_name

Problem = tuple[str, str]
"""Where, and what is wrong."""


class Recipe(Section):
    """Everything a run depends on."""

    name: str = key(
        "alignfed",
        "Name of the run, used for its directory.",
        allowed="letters, digits, dots, dashes and underscores, starting with a letter or digit",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )
    seed: int = key(0, "Seed of every draw; the same seed gives the same run.", ge=0, le=2**31 - 1)
    model: ModelSection = table(ModelSection, "The frozen base model.")
    lora: LoraSection = table(LoraSection, "The adapter that is trained.")
    data: DataSection = key(..., "The data, and who holds what.")
    training: TrainingSection = key(..., "What every client does with a task.")
    strategy: StrategySection = table(StrategySection, "How uploads become server versions.")
    server: ServerSection = table(ServerSection, "The server.")
    fleet: FleetSection = table(FleetSection, "The clients' devices.")
    stop: StopSection = key(..., "When the run ends: whichever comes first.")
    evaluation: EvaluationSection = table(EvaluationSection, "How versions are scored.")
    compare: CompareSection = table(CompareSection, "What a comparison of rules holds fixed.")
    ablate: AblateSection = table(AblateSection, "The regimes of an ablation.")
    deploy: DeploySection = table(DeploySection, "What a deployed server is given of its own.")

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        problems = [
            *_task_problems(self),
            *_rule_problems(self),
            *_length_problems(self),
            *_server_problems(self),
        ]
        if problems:
            raise UnfitError(problems)
        return self

    @property
    def steps_by_speed(self) -> StepsBySpeed | None:
        """What assigns local steps by device speed; None: everybody takes the recipe's."""
        steps, strategy = self.training.steps, self.strategy
        ours = strategy.rule == "alignfed" and strategy.settings.get("variant") != "paper"
        by_speed = ours if strategy.local_steps == "auto" else strategy.local_steps == "by_speed"
        return StepsBySpeed(steps) if by_speed and steps is not None else None

    def to_toml(self) -> str:
        """Return the recipe as TOML, every key that is set; reading it gives the same recipe."""
        return write_recipe(self)


def _task_problems(recipe: Recipe) -> Iterator[Problem]:
    template, scorer = recipe.data.template, recipe.evaluation.scorer
    own = recipe.data.path != BUILTIN
    if recipe.model.task == "sequence_classification":
        if not own:
            yield "data.path", "the built-in corpus has no labels; a classifier needs data of yours"
        elif recipe.data.label_column is None:
            yield "data.label_column", 'task "sequence_classification" needs the labels\' column'
        if template is not None and template.response:
            yield "data.template.response", "a classifier gives no response; remove it"
        if scorer not in ("none", "accuracy"):
            yield (
                "evaluation.scorer",
                f'{toml_text(scorer)} needs text; a classifier has "accuracy"',
            )
    else:
        if recipe.data.label_column is not None:
            yield "data.label_column", 'only task "sequence_classification" has labels; remove it'
        if own and template is not None and not template.response:
            yield "data.template.response", "a language model needs a response to learn"
        if scorer == "accuracy":
            yield (
                "evaluation.scorer",
                '"accuracy" needs classes; a language model has "exact_match"',
            )


def _rule_problems(recipe: Recipe) -> Iterator[Problem]:
    # The tables of rules bring torch with them; nothing that only shows help should wait for it.
    from alignfed.core.aggregation import RULES, make_rule
    from alignfed.core.lora import LORA_RULES, incompatibility

    strategy = recipe.strategy
    if strategy.lora not in LORA_RULES:
        near = nearest_name(strategy.lora, LORA_RULES)
        yield (
            "strategy.lora",
            f"{toml_text(strategy.lora)} must be one of {', '.join(LORA_RULES)}{near}",
        )
    if strategy.rule not in RULES:
        near = nearest_name(strategy.rule, RULES)
        yield "strategy.rule", f"{toml_text(strategy.rule)} must be one of {', '.join(RULES)}{near}"
        return
    yield from _lora_problems(recipe)
    known = {setting.name: setting for setting in RULES[strategy.rule].settings}
    faulty = False
    for name, value in strategy.settings.items():
        path = f"strategy.settings.{name}"
        if name not in known:
            faulty = True
            near = nearest_name(name, known) or f"; it has {joined(known, 'and')}"
            yield path, f'unknown setting of rule "{strategy.rule}"{near}'
            continue
        try:
            make_rule(strategy.rule, **{name: value})
        except RuleError:
            faulty = True
            yield path, f"= {toml_text(value)}: must be {known[name].limits}"
    if faulty:
        return
    rule = make_rule(strategy.rule, **strategy.settings)
    reason = incompatibility(rule, strategy.lora) if strategy.lora in LORA_RULES else None
    if reason is not None:
        yield "strategy.lora", f'"{strategy.lora}" cannot work with rule "{rule.name}": {reason}'
    if recipe.training.fedprox_mu > 0 and hasattr(rule, "proximal_mu"):
        yield (
            "training.fedprox_mu",
            f'rule "{strategy.rule}" has a pull of its own: set strategy.settings.mu instead',
        )
    if strategy.local_steps == "by_speed":
        if recipe.training.steps is None:
            yield (
                "strategy.local_steps",
                '"by_speed" needs training.steps, what a client of middle speed takes',
            )
        if getattr(rule, "scheduler", None) is not None:
            yield (
                "strategy.local_steps",
                f'rule "{strategy.rule}" assigns local steps itself; use "auto"',
            )
    if recipe.data.calibration_examples:
        return
    if getattr(rule, "needs_calibrator", False):
        yield (
            "data.calibration_examples",
            f'rule "{strategy.rule}" with these settings aligns by calibration data; raise it above'
            ' 0 or set strategy.settings.alignment_map = "rank"',
        )


def _lora_problems(recipe: Recipe) -> Iterator[Problem]:
    from alignfed.core.lora import LORA_RULES

    name = recipe.strategy.lora
    entry = LORA_RULES.get(name)
    if entry is None:
        return
    if recipe.lora.mixes_ranks and not entry.mixed_ranks:
        able = joined([f'"{one}"' for one, row in LORA_RULES.items() if row.mixed_ranks])
        yield (
            "lora.client_ranks" if recipe.lora.client_ranks else "lora.tier_ranks",
            f'"{name}" adds adapters of one rank; remove the ranks, or set strategy.lora to {able}',
        )
    if entry.exchange.keeps and not recipe.data.held_out_fraction:
        yield (
            "data.held_out_fraction",
            f'"{name}" is judged on clients\' own held-out examples; raise it above 0',
        )


def _length_problems(recipe: Recipe) -> Iterator[Problem]:
    length, new = recipe.data.max_length, recipe.evaluation.max_new_tokens
    if recipe.evaluation.scorer in ("exact_match", "gsm8k") and new >= length:
        yield (
            "evaluation.max_new_tokens",
            f"{new} leaves no prompt within data.max_length = {length}",
        )
    sizes = recipe.model.architecture
    if sizes is not None and sizes.max_positions is not None and length > sizes.max_positions:
        yield (
            "data.max_length",
            f"{length} is above model.architecture.max_positions = {sizes.max_positions}",
        )


def _server_problems(recipe: Recipe) -> Iterator[Problem]:
    failures = recipe.fleet.variation.failures_per_hour
    if failures and recipe.server.task_timeout_s is None:
        yield (
            "server.task_timeout_s",
            f"is unset, but fleet.variation.failures_per_hour = {failures:g} makes tasks vanish"
            " without a word, and the server would wait for ever; set it",
        )
    clients = recipe.data.partition.num_clients
    if clients is not None and recipe.server.concurrency > clients:
        yield (
            "server.concurrency",
            f"{recipe.server.concurrency} tasks in flight need as many clients;"
            f" data.partition.num_clients = {clients}",
        )

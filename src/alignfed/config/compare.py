"""Sections about studies: what a comparison holds fixed, and the regimes of an ablation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from alignfed.config.section import Section, UnfitError, key

Positive = Annotated[float, Field(gt=0)]
Numbers = Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)]
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, le=2**31 - 1)], ...], Field(strict=False, min_length=1)
]


class CompareSection(Section):
    """What `alignfed compare` and `alignfed ablate` hold fixed before anything is run."""

    target_score: float | None = key(
        None, "Score to reach; the time until then is compared.", gt=0, le=1, suggested=0.9
    )
    target_loss: float | None = key(
        None, "Or a loss on the common evaluation set, in nats.", gt=0, suggested=0.5
    )
    seeds: Seeds = key(
        (0, 1, 2),
        "Reported seeds: data, devices and draws; each rule runs on all.",
        allowed="a list of whole numbers of at least 0",
    )
    tuning_seed: int = key(
        1000, "Seed on which server steps are chosen; never reported.", ge=0, le=2**31 - 1
    )
    tuning_factors: Numbers = key(
        (1.0, 2.0, 4.0),
        "Server steps that each baseline may try, as multiples of its default. Where the largest"
        " would pass a step's upper limit, all are scaled down so that it is the limit.",
        allowed="a list of numbers above 0",
    )
    tuning_share: float = key(
        0.5, "Client work of a tuning run, as a share of a reported one's.", gt=0, le=1
    )
    tuning_measure: Literal["time_to_target", "final_loss"] = key(
        "time_to_target", "What the chosen step is best at; the other one breaks ties."
    )
    evaluate_every_uploads: int | None = key(
        None,
        "Uploads between evaluations; unset: server.buffer_size. A synchronous rule is evaluated"
        " once a round at most.",
        ge=1,
        suggested=8,
    )
    final_evaluations: int = key(
        3, "Final values are means over so many last evaluations.", ge=1, le=100
    )
    steps: dict[str, Numbers] = key(
        {},
        "Server steps to try, by rule, where multiples of the default will not do; as many as"
        " tuning_factors.",
        allowed="a table of lists, as many numbers in each as tuning_factors has",
    )

    @model_validator(mode="after")
    def _fits(self) -> CompareSection:
        problems = []
        if self.target_score is not None and self.target_loss is not None:
            problems.append(("target_loss", "target_score is set too; keep one target"))
        repeated = sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1})
        if repeated:
            problems.append(("seeds", f"seed {repeated[0]} stands there twice; name each once"))
        if self.tuning_seed in self.seeds:
            problems.append(
                (
                    "tuning_seed",
                    f"{self.tuning_seed} is one of the reported seeds; steps chosen on what is"
                    " reported would flatter every rule, so take another",
                )
            )
        for rule, steps in self.steps.items():
            if len(steps) != len(self.tuning_factors):
                problems.append(
                    (
                        f"steps.{rule}",
                        f"names {len(steps)} steps, tuning_factors {len(self.tuning_factors)};"
                        " every rule gets the same budget",
                    )
                )
        if problems:
            raise UnfitError(problems)
        return self


class AblateSection(Section):
    """The regimes of `alignfed ablate`: every staleness level with every skew."""

    in_flight: Counts = key(
        (8, 32, 72), "Tasks in flight, level by level.", allowed="a list of whole numbers above 0"
    )
    buffers: Counts = key(
        (4, 4, 3),
        "Uploads a flush, level by level; mean staleness is about (in flight - 1) / buffer.",
        allowed="a list of whole numbers above 0, as many as in_flight has",
    )
    alphas: Numbers = key(
        (1.0, 0.1),
        "Concentrations of the Dirichlet deal; smaller is less even.",
        allowed="a list of numbers above 0",
    )
    clients: int = key(96, "Clients that the data are dealt to.", ge=1)
    min_size: int = key(8, "Fewest examples a client may hold.", ge=1)

    @model_validator(mode="after")
    def _fits(self) -> AblateSection:
        problems = []
        if len(self.buffers) != len(self.in_flight):
            problems.append(
                (
                    "buffers",
                    f"{len(self.buffers)} buffers for {len(self.in_flight)} levels in flight; give"
                    " each level one",
                )
            )
        if max(self.in_flight) > self.clients:
            problems.append(
                (
                    "clients",
                    f"{self.clients} clients cannot hold {max(self.in_flight)} tasks in flight;"
                    " raise clients or lower in_flight",
                )
            )
        if problems:
            raise UnfitError(problems)
        return self

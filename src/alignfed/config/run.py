"""Sections about the run: local training, server, rule, evaluation and when to stop."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from alignfed.config.section import Section, UnfitError, key


class TrainingSection(Section):
    """What every client does with a task."""

    steps: int | None = key(None, "Optimiser steps a task; or set epochs.", ge=1, suggested=10)
    epochs: float | None = key(
        None, "Passes over the client's examples a task; or set steps.", gt=0, suggested=1.0
    )
    batch_size: int = key(8, "Examples a step.", ge=1)
    cohort_size: int | Literal["auto"] = key(
        1,
        "Tasks under way that are trained in one pass; the same to rounding. auto: as many as a"
        " short measurement finds fastest, within the memory there is; the run keeps the number,"
        " but another run may measure another one.",
        allowed='a whole number from 1 to 1024, or "auto"',
    )
    workers: int | Literal["auto"] = key(
        "auto",
        "Processes that train tasks under way side by side, one copy of the base each; the same to"
        " rounding. 1: the run's own process. auto: one a core for a small model on a CPU, where"
        " there is enough to train; else 1. The run keeps the number.",
        allowed='a whole number from 1 to 1024, or "auto"',
    )
    threads: int | Literal["auto"] = key(
        "auto",
        "Torch threads of each process that trains; rounding depends on them. auto: 1 beside other"
        " workers, else what torch finds. The run keeps the number.",
        allowed='a whole number from 1 to 1024, or "auto"',
    )
    workers_on: Literal["processes", "ray"] = key(
        "processes",
        "Where workers are: processes of this machine, or Ray's, on one machine or several (pip"
        " install alignfed[ray]).",
    )
    ray_address: str | None = key(
        None,
        'Address of the running Ray cluster, or "auto". Unset: Ray is started on this machine.',
        min_length=1,
        suggested="auto",
    )
    learning_rate: float = key(1e-3, "AdamW's learning rate, after the warm-up.", gt=0, le=10)
    warmup_steps: int = key(0, "Steps over which the learning rate rises from 0.", ge=0)
    decay: Literal["none", "linear", "cosine"] = key(
        "none", "How the learning rate falls over a task, after the warm-up."
    )
    weight_decay: float = key(0.0, "AdamW's decoupled weight decay.", ge=0)
    beta1: float = key(0.9, "AdamW's decay of the mean gradient.", ge=0, lt=1)
    beta2: float = key(0.999, "AdamW's decay of the mean squared gradient.", ge=0, lt=1)
    max_grad_norm: float = key(1.0, "Longer gradients are cut to this norm; 0 leaves them.", ge=0)
    fedprox_mu: float = key(
        0.0, "Pull towards the adapter a task started from (FedProx); 0 is off.", ge=0
    )
    representation_penalty: float = key(
        0.0, "Pull of features towards the base model's (AlignFed, Eq. 3); 0 is off.", ge=0
    )

    @model_validator(mode="after")
    def _one_amount(self) -> TrainingSection:
        for name in ("cohort_size", "workers", "threads"):
            value = getattr(self, name)
            if value != "auto" and not 1 <= value <= 1024:
                raise UnfitError([(name, f'is {value}, must be from 1 to 1024, or "auto"')])
        if self.ray_address is not None and self.workers_on != "ray":
            raise UnfitError(
                [("ray_address", 'is set, but workers_on is not "ray"; set that, or remove this')]
            )
        if self.steps is None and self.epochs is None:
            raise UnfitError([("steps", "say how much a task trains: set steps or epochs")])
        if self.steps is not None and self.epochs is not None:
            raise UnfitError(
                [
                    (
                        "epochs",
                        f"steps = {self.steps} is set too; remove one (--set training.steps=unset)",
                    )
                ]
            )
        return self


class StrategySection(Section):
    """How uploads become server versions."""

    rule: str = key(
        "alignfed",
        "Aggregation rule; `alignfed strategies` lists them with their settings.",
        allowed="a rule that `alignfed strategies` lists",
    )
    lora: str = key(
        "factor",
        "How LoRA factors combine: factor by factor, or exactly as products.",
        allowed="a LoRA rule that `alignfed strategies` lists",
    )
    settings: dict[str, bool | int | float | str] = key(
        {}, "Settings of the rule.", allowed="a table of the rule's settings"
    )
    local_steps: Literal["auto", "equal", "by_speed"] = key(
        "auto",
        "Whether every task takes training.steps, or as many as its client's measured speed allows"
        " for, so that all take about as long. auto: by speed under alignfed, else equal.",
    )


class ServerSection(Section):
    """How many clients work at once, when the buffer is applied, and how fast the server is."""

    concurrency: int = key(8, "Tasks in flight; for a synchronous rule the clients a round.", ge=1)
    buffer_size: int = key(
        4, "Uploads that make a flush; a synchronous rule waits for its round instead.", ge=1
    )
    flush_timeout_s: float | None = key(
        None,
        "Virtual seconds after its first upload when a buffer is applied though not full; for a"
        " synchronous rule the longest round. Unset: never.",
        gt=0,
        suggested=600.0,
    )
    task_timeout_s: float | None = key(
        None,
        "Virtual seconds after which a task without an answer is given up. Unset: never.",
        gt=0,
        suggested=3600.0,
    )
    retry_backoff_s: float = key(
        1.0, "Pause before a client that failed gets work again; doubles each time.", ge=0
    )
    max_backoff_s: float = key(3600.0, "Longest such pause, in virtual seconds.", ge=0)
    max_norm_ratio: float = key(
        10.0,
        "Uploads longer than this multiple of the recent median are refused; 0 refuses none by"
        " length.",
        ge=0,
    )
    memory_bytes_per_s: float = key(
        20e9, "The server's memory bandwidth, for its modelled time.", gt=0
    )
    flops_per_s: float = key(1e12, "The server's achieved FLOP/s, for its modelled time.", gt=0)
    buffer_folder: str | None = key(
        None,
        "Folder on disk where accepted uploads wait, mapped into memory: for buffers larger than"
        " memory under rules that hold them (ace, alignfed, ca2fl, port). Unset: memory.",
        suggested="buffer",
    )

    @model_validator(mode="after")
    def _backoff_grows(self) -> ServerSection:
        if self.max_backoff_s < self.retry_backoff_s:
            raise UnfitError(
                [("max_backoff_s", f"is below retry_backoff_s = {self.retry_backoff_s:g}")]
            )
        return self


class StopSection(Section):
    """When the run ends: whichever comes first."""

    virtual_time_s: float | None = key(None, "Virtual seconds.", gt=0, suggested=86400.0)
    uploads: int | None = key(None, "Answers received, accepted or refused.", ge=1, suggested=240)
    versions: int | None = key(None, "Published server versions.", ge=1, suggested=60)
    tokens: int | None = key(
        None, "Tokens that clients report having trained on.", ge=1, suggested=600_000
    )
    target_loss: float | None = key(
        None, "Loss on the common evaluation set to reach, in nats.", gt=0, suggested=0.5
    )
    patience: int | None = key(
        None, "Evaluations in a row without an improvement.", ge=1, suggested=10
    )
    min_improvement: float = key(0.0, "Smallest fall of the loss that counts, in nats.", ge=0)

    @model_validator(mode="after")
    def _ends(self) -> StopSection:
        certain = (self.virtual_time_s, self.uploads, self.versions, self.tokens, self.patience)
        if any(limit is not None for limit in certain):
            return self
        reached = "a target that is never reached ends nothing" if self.target_loss else ""
        raise UnfitError(
            [
                (
                    "",
                    f"{reached or 'nothing ends the run'}; set one of virtual_time_s, uploads,"
                    " versions, tokens or patience",
                )
            ]
        )


class EvaluationSection(Section):
    """How and how often server versions are scored."""

    every_versions: int = key(1, "Published versions between evaluations.", ge=1)
    measure: Literal["loss", "score", "clients"] = key(
        "loss",
        "What every evaluation measures: the loss; the score too; or also loss and score on each"
        " client's own held-out slice. First and last version are scored in any case.",
    )
    scorer: Literal["none", "exact_match", "gsm8k", "accuracy"] = key(
        "none",
        "Score beside the loss: generated text equals the response, GSM8K's final number is"
        " right, or the class is (classifiers).",
    )
    max_new_tokens: int = key(32, "Longest generated answer, in tokens.", ge=1)
    score_examples: int | None = key(
        None, "Score at most so many examples; the loss always takes all.", ge=1, suggested=120
    )
    tokens_per_batch: int = key(4096, "Tokens that run together, filler included.", ge=1)
    per_client: bool = key(True, "Score the final version on each client's own held-out slice.")

"""One client's local fine-tuning. Nothing but the adapter's tensors changes.

A result depends on the task and its adapter alone: the optimiser starts afresh, batches and dropout
draw from (seed, client, dispatch).

A step's loss is the mean cross-entropy over the batch's scored tokens (over its texts for a
classifier), plus ``representation_penalty`` times the mean over scored positions of the squared
distance ``||h_local(x) - h_base(x)||^2`` between penultimate features with and without the adapter
(AlignFed, Eq. 3 as reported). FedProx adds ``mu / 2 ||w - w_base||^2`` over everything trained (Li
et al. 2020, Eq. 2). Clipping sees the gradient of the whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from alignfed.core.ports import TaskWork, TrainingJob, TrainingResult
from alignfed.core.update import Task
from alignfed.errors import RecipeError
from alignfed.training.batches import Amount, Batch, BatchPlan, ClientBatches
from alignfed.training.data import ClientData
from alignfed.training.encoding import Encoder
from alignfed.training.forward import score, without_adapter
from alignfed.training.models import BaseModel
from alignfed.training.streams import torch_seed


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """What every client does with a task.

    Attributes:
        steps: optimiser steps; exactly one of steps and epochs is given.
        epochs: passes over the client's examples, fractions allowed, at least one step.
        batch_size: examples a step.
        learning_rate: AdamW's, after the warm-up.
        weight_decay: AdamW's, decoupled (Loshchilov and Hutter 2019), on everything trained.
        beta1: AdamW's decay of the mean gradient.
        beta2: AdamW's decay of the mean squared gradient.
        max_grad_norm: gradients longer than this are scaled down to it; 0 leaves them.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        decay: of the learning rate over the task, after the warm-up, towards 0.
        fedprox_mu: strength of the pull towards the adapter the task started from; 0 is off.
        representation_penalty: strength of the pull of features towards the base's; 0 is off.

    Raises:
        RecipeError: a value outside its range.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    fedprox_mu: float = 0.0
    representation_penalty: float = 0.0

    def __post_init__(self) -> None:
        """Check each value against its range."""
        if (self.steps is None) == (self.epochs is None):
            raise RecipeError(
                f"give either steps or epochs of local training, not steps={self.steps} and"
                f" epochs={self.epochs}"
            )
        if self.decay not in ("none", "linear", "cosine"):
            raise RecipeError(f"decay is {self.decay!r}, must be 'none', 'linear' or 'cosine'")
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} is {value}, must be at least 1")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RecipeError(f"{name} is {value}, must be above 0 and finite")
        for name in (
            "weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "fedprox_mu",
            "representation_penalty",
        ):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise RecipeError(f"{name} is {value}, must be at least 0 and finite")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}, must be in [0, 1)")

    @property
    def amount(self) -> Amount:
        """Return how much a task trains."""
        return Amount(self.batch_size, self.steps, self.epochs)


def learning_rate_at(settings: LocalSettings, step: int, num_steps: int) -> float:
    """Return the learning rate of a step, counted from 0, of a task of ``num_steps``."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.decay == "none":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    left = 1 - done if settings.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * left


class LocalTrainer:
    """Trains clients one after another on the one loaded base (``core.ports.ClientTrainer``)."""

    def __init__(
        self,
        base: BaseModel,
        encoder: Encoder,
        clients: Mapping[int, ClientData],
        settings: LocalSettings,
        seed: int,
    ) -> None:
        """Keep the clients' examples; each is tokenised when first asked for."""
        self.base = base
        self.settings = settings
        self.seed = seed
        self.data = ClientBatches(encoder, clients, settings.amount, seed)
        flops = base.training_flops_per_token(base.initial_adapter())
        if settings.representation_penalty > 0:
            flops += base.forward_flops_per_token(None)
        self._flops_per_token = flops

    def work(self, task: Task) -> TaskWork:
        """Return the tokens, filler included, of exactly the batches the task will see."""
        plan = self.data.plan(task.client_id, task.dispatch)
        return TaskWork(plan.tokens, self._flops_per_token)

    def train(self, jobs: Sequence[TrainingJob]) -> list[TrainingResult]:
        """Return one result a job, in order."""
        return [self._train_one(job) for job in jobs]

    def _train_one(self, job: TrainingJob) -> TrainingResult:
        client_id, dispatch = job.task.client_id, job.task.dispatch
        plan = self.data.plan(client_id, dispatch)
        base = self.base
        base.install(job.adapter)
        optimiser = make_optimiser(base.values, self.settings)
        anchor = base.values.clone() if self.settings.fedprox_mu > 0 else None
        losses: list[Tensor] = []
        with self._dropout_seeded(client_id, dispatch), base.training():
            for step, batch in enumerate(self.data.batches(client_id, plan)):
                base.gradients.zero_()
                losses.append(self._backward(batch.to(base.device)))
                if anchor is not None:
                    base.gradients.add_(base.values - anchor, alpha=self.settings.fedprox_mu)
                clip(base.gradients, self.settings.max_grad_norm)
                rate = learning_rate_at(self.settings, step, len(plan.steps))
                optimiser.param_groups[0]["lr"] = rate
                optimiser.step()
        return TrainingResult(
            base.read(like=job.adapter.layout), plan.num_examples, _metrics(losses, plan)
        )

    def _backward(self, batch: Batch) -> Tensor:
        """Add a batch's gradients; return its cross-entropy, without the penalties."""
        strength = self.settings.representation_penalty
        before = None
        if strength > 0:
            with without_adapter(self.base):
                before = score(self.base, batch).features
        scored = score(self.base, batch)
        loss = scored.losses.mean()
        total = loss
        if before is not None:
            moved = (scored.features.float() - before.float()).square().sum(dim=-1)
            total = loss + strength * moved.mean()
        total.backward()
        return loss.detach()

    @contextlib.contextmanager
    def _dropout_seeded(self, client_id: int, dispatch: int) -> Iterator[None]:
        if self.base.dropout == 0:
            yield
            return
        index = self.base.device.index
        with torch.random.fork_rng([] if index is None else [index]):
            torch.manual_seed(torch_seed(self.seed, "dropout", client_id, dispatch))
            yield


def make_optimiser(values: Tensor, settings: LocalSettings) -> torch.optim.Optimizer:
    """Return a fresh AdamW over one flat tensor whose ``grad`` is set.

    Elementwise it is the same as one over many tensors, in one fused pass over memory.
    """
    return torch.optim.AdamW(
        [values],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def clip(gradients: Tensor, max_norm: float) -> None:
    """Scale gradients down to a Euclidean norm of at most ``max_norm``, in place; 0 is off."""
    if max_norm > 0:
        # As torch.nn.utils.clip_grad_norm_, without asking the device for the norm's value.
        norm = torch.linalg.vector_norm(gradients)
        gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


def _metrics(losses: list[Tensor], plan: BatchPlan) -> dict[str, float]:
    every = torch.stack(losses).tolist()
    return {
        "loss": sum(every) / len(every),
        "loss_first": every[0],
        "loss_last": every[-1],
        "tokens": float(plan.tokens),
    }

"""Which trainer a recipe asks for: alone, together in one pass, or in processes side by side."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from alignfed.config import Recipe, TrainingSection
from alignfed.core.aggregation import make_rule
from alignfed.core.lora import exchange_of
from alignfed.core.ports import ClientTrainer, TaskWork, TrainingJob
from alignfed.core.update import Task
from alignfed.prestart import usable_cores
from alignfed.training.cohort import MAX_WIDTH, CohortTrainer
from alignfed.training.data import FederatedData
from alignfed.training.encoding import Encoder
from alignfed.training.local import LocalSettings, LocalTrainer
from alignfed.training.models import BaseModel
from alignfed.training.ray_cohorts import RaySettings, RayTrainer
from alignfed.training.ray_worker import TrainerSetup
from alignfed.training.settings import LoraSettings
from alignfed.training.templates import TemplateSettings
from alignfed.training.width import free_bytes
from alignfed.training.worker_pool import PoolTrainer

WORKER_BYTES = 512 << 20
"""What a worker holds besides its base: the libraries, batches and activations of a small model."""


CHOSEN = ("cohort_size", "workers", "threads")
"""Keys of a recipe that may say "auto"; a run's own recipe has the numbers."""

MOST_PARAMETERS = 50_000_000
"""Larger bases use a machine's cores within their own operations, and need no copies."""

WORTH_FLOPS = 5e11
"""Training that a core does in some ten seconds: about what it takes to start workers."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A trainer, and how it is to be used.

    Attributes:
        trainer: trains clients.
        training: the recipe's section with every number in it, for the run's record.
        cohort_size: tasks the trainer is to be given together at most.
        lookahead: tasks it may hold at most, where it computes in the background.
        notes: what somebody who watches the run should know.
    """

    trainer: ClientTrainer
    training: TrainingSection
    cohort_size: int
    lookahead: int
    notes: tuple[str, ...] = ()

    def close(self) -> None:
        """Let the trainer's workers go, where it has any. May be repeated."""
        if isinstance(self.trainer, PoolTrainer | RayTrainer):
            self.trainer.close()


def make_trainer(
    recipe: Recipe,
    base: BaseModel,
    encoder: Encoder,
    template: TemplateSettings,
    data: FederatedData,
) -> Placed:
    """Return what trains clients, where, and how many together.

    Numbers of torch threads are this process's too: what it computes itself is rounded by them.

    Raises:
        AlignFedError: workers cannot be had where the recipe wants them.
    """
    training, settings, seed = recipe.training, local_settings(recipe), recipe.seed
    alone = LocalTrainer(base, encoder, data.clients, settings, seed)
    tasks = [Task(i, client_id, 0, 0) for i, client_id in enumerate(data.clients)][:MAX_WIDTH]
    workers = training.workers
    if workers == "auto":
        workers = _fitting_workers(recipe, base, [alone.work(task) for task in tasks])
    beside = workers > 1 or training.workers_on == "ray"
    if training.threads != "auto":
        torch.set_num_threads(training.threads)
    elif beside:
        torch.set_num_threads(1)
    threads = torch.get_num_threads()
    width = training.cohort_size
    notes: tuple[str, ...] = ()
    if width == "auto":
        together = CohortTrainer(base, encoder, data.clients, settings, seed)
        jobs = [TrainingJob(task, base.initial_adapter()) for task in tasks]
        most = max(1, min(MAX_WIDTH, recipe.server.concurrency // workers))
        chosen = together.choose_width(jobs, max_width=most)
        width, notes = chosen.width, chosen.notes
    training = training.model_copy(
        update={"cohort_size": width, "workers": workers, "threads": threads}
    )
    kind = LocalTrainer if width == 1 else partial(CohortTrainer, width=width)
    trainer: ClientTrainer = alone
    if not beside:
        if width > 1:
            trainer = kind(base, encoder, data.clients, settings, seed)
        return Placed(trainer, training, width, width, notes)
    setup = TrainerSetup(
        model=base.settings,
        lora=lora_settings(recipe),
        template=template,
        max_length=recipe.data.max_length,
        clients=data.clients,
        settings=settings,
        seed=seed,
        trainer=kind,
    )
    if training.workers_on == "ray":
        on_ray = RaySettings(
            num_workers=workers,
            num_cpus=threads,
            num_gpus=1.0 if base.device.type == "cuda" else 0.0,
            threads=threads,
            cohort_size=width,
            address=training.ray_address,
        )
        trainer = RayTrainer(setup, alone.work, on_ray)
        return Placed(trainer, training, width * workers, width * workers, notes)
    trainer = PoolTrainer(setup, alone.work, workers, threads)
    return Placed(trainer, training, width, 2 * width * workers, notes)


def _fitting_workers(recipe: Recipe, base: BaseModel, works: Sequence[TaskWork]) -> int:
    """Return how many workers pay on this machine, by sizes alone: nothing is measured."""
    if multiprocessing.current_process().daemon:
        return 1  # a study's worker: the other cores have runs of their own
    sizes, stop = base.architecture, recipe.stop
    flops = sum(one.tokens * one.flops_per_token for one in works) / len(works)
    tokens = sum(one.tokens for one in works) / len(works)
    uploads = min(stop.uploads or math.inf, (stop.tokens or math.inf) / tokens)
    small = base.device.type == "cpu" and sizes.num_parameters <= MOST_PARAMETERS
    if not small or uploads * flops < WORTH_FLOPS:
        return 1
    free = free_bytes(base.device)
    fit = usable_cores() if free is None else int(free / (4 * sizes.weight_bytes + WORKER_BYTES))
    return max(1, min(usable_cores(), recipe.server.concurrency, fit))


def lora_settings(recipe: Recipe) -> LoraSettings:
    """Return which adapter the recipe asks for."""
    section = recipe.lora
    return LoraSettings(
        rank=section.rank,
        alpha=section.alpha,
        dropout=section.dropout,
        targets=section.targets,
        warm_start=section.warm_start,
        modules_to_save=section.modules_to_save,
    )


def local_settings(recipe: Recipe) -> LocalSettings:
    """Return what the recipe has every client do with a task."""
    section = recipe.training
    rule = make_rule(recipe.strategy.rule, **recipe.strategy.settings)
    return LocalSettings(
        steps=section.steps,
        epochs=section.epochs,
        batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        beta1=section.beta1,
        beta2=section.beta2,
        max_grad_norm=section.max_grad_norm,
        warmup_steps=section.warmup_steps,
        decay=section.decay,
        fedprox_mu=getattr(rule, "proximal_mu", section.fedprox_mu),
        representation_penalty=section.representation_penalty,
        trained=exchange_of(recipe.strategy.lora).trained,
    )

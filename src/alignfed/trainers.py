"""Which trainer a recipe asks for: alone, together in one pass, or in processes side by side."""

from __future__ import annotations

import math
from functools import partial

from alignfed.config import Recipe
from alignfed.core.aggregation import make_rule
from alignfed.core.lora import exchange_of
from alignfed.core.ports import ClientTrainer, TrainingJob
from alignfed.core.update import Task
from alignfed.training.cohort import MAX_WIDTH, CohortTrainer
from alignfed.training.data import FederatedData
from alignfed.training.encoding import Encoder
from alignfed.training.local import LocalSettings, LocalTrainer
from alignfed.training.models import BaseModel
from alignfed.training.ray_worker import TrainerSetup
from alignfed.training.settings import LoraSettings
from alignfed.training.templates import TemplateSettings
from alignfed.training.worker_pool import PoolTrainer


def make_trainer(
    recipe: Recipe,
    base: BaseModel,
    encoder: Encoder,
    template: TemplateSettings,
    data: FederatedData,
) -> tuple[ClientTrainer, int]:
    """Return what trains clients, and how many tasks it is to be given together at most."""
    training, settings, seed = recipe.training, local_settings(recipe), recipe.seed
    alone = LocalTrainer(base, encoder, data.clients, settings, seed)
    width = training.cohort_size
    if width == 1 and training.workers == 1:
        return alone, 1
    if width == "auto":
        together = CohortTrainer(base, encoder, data.clients, settings, seed)
        first = [Task(i, client_id, 0, 0) for i, client_id in enumerate(data.clients)]
        jobs = [TrainingJob(task, base.initial_adapter()) for task in first[:MAX_WIDTH]]
        width = training.workers * together.choose_width(jobs).width
    if training.workers == 1:
        return CohortTrainer(base, encoder, data.clients, settings, seed, width=width), width
    share = math.ceil(width / training.workers)
    setup = TrainerSetup(
        model=base.settings,
        lora=lora_settings(recipe),
        template=template,
        max_length=recipe.data.max_length,
        clients=data.clients,
        settings=settings,
        seed=seed,
        trainer=LocalTrainer if share == 1 else partial(CohortTrainer, width=share),
    )
    pool = PoolTrainer(setup, alone.work, training.workers)
    return pool, max(width, training.workers)


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

"""From a recipe to the coordinator it asks for; neither data nor model is loaded for that."""

from __future__ import annotations

import math
from collections.abc import Callable

from alignfed.config import Recipe
from alignfed.core.adapter import Adapter
from alignfed.core.aggregation import make_rule
from alignfed.core.coordinator import Coordinator
from alignfed.core.lora import Exchange, make_lora_rule
from alignfed.core.ports import Calibrator
from alignfed.core.state import CoordinatorSettings, StopConditions


def make_coordinator(
    recipe: Recipe,
    calibrator: Calibrator | None,
    exchange: Exchange,
    put_by: Callable[[Adapter], Adapter] | None = None,
) -> Coordinator:
    """Return the coordinator of a recipe.

    Args:
        recipe: names rule, LoRA rule, settings.
        calibrator: the server's calibration mini-batch, if it holds one.
        exchange: what of an adapter travels, and at which rank.
        put_by: where an accepted upload waits for its flush; None: in memory.
    """
    return Coordinator(
        coordinator_settings(recipe),
        make_rule(recipe.strategy.rule, **recipe.strategy.settings),
        make_lora_rule(recipe.strategy.lora),
        calibrator,
        exchange,
        put_by,
    )


def coordinator_settings(recipe: Recipe) -> CoordinatorSettings:
    """Return the coordinator's settings."""
    server, stop = recipe.server, recipe.stop
    return CoordinatorSettings(
        concurrency=server.concurrency,
        buffer_size=server.buffer_size,
        flush_timeout_s=or_never(server.flush_timeout_s),
        task_timeout_s=or_never(server.task_timeout_s),
        retry_backoff_s=server.retry_backoff_s,
        max_backoff_s=server.max_backoff_s,
        max_norm_ratio=server.max_norm_ratio or math.inf,
        evaluate_every=recipe.evaluation.every_versions,
        stop=StopConditions(
            max_time_s=or_never(stop.virtual_time_s),
            max_uploads=or_never(stop.uploads),
            max_versions=or_never(stop.versions),
            max_tokens=or_never(stop.tokens),
            target_loss=-math.inf if stop.target_loss is None else stop.target_loss,
            patience=or_never(stop.patience),
            min_improvement=stop.min_improvement,
        ),
        local_steps=recipe.steps_by_speed,
    )


def or_never(limit: float | None) -> float:
    """Return a limit, or infinity where there is none."""
    return math.inf if limit is None else limit

"""From a recipe to what a server needs: coordinator, base model, and data of its own if any.

A server scores versions and calibrates with examples its operator gave it (``[deploy]`` in the
recipe), or with those that the recipe's data sets aside where that data is here too: the built-in
corpus always is. With neither, it says which features are off and runs without them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from alignfed.build import (
    build_data,
    build_exchange,
    build_fleet,
    data_settings,
    model_settings,
    template_of,
)
from alignfed.config import Recipe
from alignfed.config.section import BUILTIN
from alignfed.coordinating import make_coordinator
from alignfed.core.adapter import Adapter
from alignfed.core.aggregation import make_rule
from alignfed.core.coordinator import Coordinator
from alignfed.core.instructions import Evaluate
from alignfed.core.lora import exchange_of
from alignfed.core.ports import Calibrator, Evaluation
from alignfed.errors import DataError, DeploymentError
from alignfed.trainers import lora_settings
from alignfed.training.calibration import CalibrationBatch
from alignfed.training.data import FederatedData, content_key, content_keys
from alignfed.training.encoding import Encoder
from alignfed.training.evaluate import EvaluationSettings, HeldOutEvaluator
from alignfed.training.federate import server_examples
from alignfed.training.loading import load_base
from alignfed.training.models import BaseModel
from alignfed.training.templates import Example


@dataclass(frozen=True)
class Serving:
    """What a server is made of, before it meets a grid.

    Attributes:
        recipe: what it was built from.
        base: the base model.
        coordinator: decides; its calibrator takes turns with ``evaluate``.
        evaluate: scores a version on the evaluation set; None: there is none.
        evaluate_fully: the same with the recipe's scorer, whatever is measured meanwhile.
        evaluate_clients: scores an adapter on clients' held-out slices, where their data is here.
        off: features that are off, each with the reason and the remedy.
    """

    recipe: Recipe
    base: BaseModel
    coordinator: Coordinator
    evaluate: Callable[[Evaluate], Evaluation] | None
    evaluate_fully: Callable[[Adapter], Evaluation] | None
    evaluate_clients: Callable[[Adapter], Mapping[int, Evaluation]] | None
    off: tuple[str, ...]

    @property
    def initial_adapter(self) -> Adapter:
        """The adapter of version 0."""
        return self.base.initial_adapter()


def build_serving(recipe: Recipe, client_ids: Sequence[int]) -> Serving:
    """Load the base model and the server's data, and make the coordinator. Writes nothing.

    Args:
        recipe: the federation's.
        client_ids: the clients known so far; others may join later.

    Raises:
        AlignFedError: what the recipe names does not exist or does not fit together.
    """
    data, off = server_data(recipe)
    labels = data.label_names or recipe.data.label_names or ()
    base = load_base(model_settings(recipe, tuple(labels)), lora_settings(recipe), recipe.seed)
    encoder = Encoder(base, template_of(recipe), recipe.data.max_length)
    turns = threading.Lock()
    calibrator: Calibrator | None = None
    if data.calibration:
        calibrator = _Calibrator(CalibrationBatch(base, encoder, data.calibration), turns)
    count = max([*client_ids, len(data.clients) - 1, 0]) + 1
    rule = make_rule(recipe.strategy.rule, **recipe.strategy.settings)
    if calibrator is None and getattr(rule, "needs_calibrator", False):
        raise DeploymentError(
            f'rule "{recipe.strategy.rule}" with these settings aligns by calibration data, and the'
            " server has none: name a file in deploy.calibration, or set"
            ' strategy.settings.alignment_map = "rank"'
        )
    fleet = build_fleet(recipe.fleet, count, recipe.seed)
    exchange = build_exchange(recipe, fleet, base.initial_adapter())
    coordinator = make_coordinator(recipe, calibrator, exchange)
    scoring = recipe.evaluation
    serving = Serving(recipe, base, coordinator, None, None, None, off)
    if not data.evaluation:
        return serving
    settings = EvaluationSettings(
        scoring.scorer, scoring.max_new_tokens, scoring.score_examples, scoring.tokens_per_batch
    )
    evaluator = HeldOutEvaluator(base, encoder, data, settings)

    def evaluate(asked: Evaluate) -> Evaluation:
        with turns:
            return evaluator.evaluate(asked.adapter, with_score=scoring.measure != "loss")

    def evaluate_fully(adapter: Adapter) -> Evaluation:
        with turns:
            return evaluator.evaluate(adapter, with_score=True)

    def evaluate_clients(adapter: Adapter) -> Mapping[int, Evaluation]:
        with turns:
            return evaluator.evaluate_clients(adapter)

    per_client = scoring.per_client and not exchange_of(recipe.strategy.lora).keeps
    return replace(
        serving,
        evaluate=evaluate,
        evaluate_fully=evaluate_fully,
        evaluate_clients=evaluate_clients if data.clients and per_client else None,
    )


def server_data(recipe: Recipe) -> tuple[FederatedData, tuple[str, ...]]:
    """Return the examples that a server holds, and which features are off for want of others.

    Raises:
        DataError: a file that is named does not exist or does not fit.
    """
    own = recipe.deploy
    here = recipe.data.path == BUILTIN or Path(recipe.data.path).expanduser().exists()
    data = FederatedData({}, (), (), tuple(recipe.data.label_names or ()))
    if here:
        data, _ = build_data(recipe)
    settings, template = data_settings(recipe), template_of(recipe)
    if own.evaluation is not None:
        path = Path(own.evaluation).expanduser()
        found = server_examples(path, "deploy.evaluation", settings, template)
        if settings.evaluation_examples is not None:
            found = found[: settings.evaluation_examples]
        data = replace(data, evaluation=tuple(found), evaluation_source=str(path))
    if own.calibration is not None and settings.calibration_examples:
        path = Path(own.calibration).expanduser()
        found = server_examples(path, "deploy.calibration", settings, template)
        data = replace(
            data,
            calibration=_apart(found, data.evaluation, settings.calibration_examples, path),
            calibration_source=str(path),
        )
    off = []
    if not data.evaluation:
        off.append(
            "versions are not scored, so neither a target loss nor patience can end the run: name"
            " a file in deploy.evaluation"
        )
    if not data.calibration:
        why = (
            "data.calibration_examples is 0"
            if not settings.calibration_examples
            else "name a file in deploy.calibration"
        )
        off.append(f"steps are neither guarded nor aligned by calibration data: {why}")
    if not data.clients and recipe.evaluation.per_client:
        off.append("clients' own held-out losses are unknown: their data stays with them")
    if exchange_of(recipe.strategy.lora).keeps:
        off.append(
            f'"{recipe.strategy.lora}" leaves each client a part of its adapter: versions are'
            " scored without it"
        )
    return data, tuple(off)


def _apart(
    examples: Sequence[Example], evaluation: Sequence[Example], count: int, path: Path
) -> tuple[Example, ...]:
    taken = content_keys(evaluation)
    left = [one for one in examples if content_key(one) not in taken][:count]
    if len(left) < count:
        raise DataError(
            f"{path} holds {len(left)} examples that differ and are not in the evaluation set,"
            f" data.calibration_examples is {count}; add some or lower it",
            path=str(path),
        )
    return tuple(left)


class _Calibrator:
    """A calibrator that waits while a version is scored: both install adapters in one model."""

    def __init__(self, batch: CalibrationBatch, turns: threading.Lock) -> None:
        self._batch = batch
        self._turns = turns

    @property
    def tokens(self) -> int:
        return self._batch.tokens

    def loss(self, adapter: Adapter) -> float:
        with self._turns:
            return self._batch.loss(adapter)

    def inputs(self, adapter: Adapter) -> Mapping[str, Tensor]:
        with self._turns:
            return self._batch.inputs(adapter)

    def features(self, adapter: Adapter) -> Tensor:
        with self._turns:
            return self._batch.features(adapter)


__all__ = ["Serving", "build_serving", "server_data"]

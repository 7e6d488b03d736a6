"""Taking learnt harm out of a finished run's adapter, and measuring what that cost.

Nothing is trained: weights of the adapter are set to zero, once (``core/pruning.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignfed.build import Loaded, data_settings, load, template_of
from alignfed.config import Recipe, load_recipe
from alignfed.core.adapter import Adapter
from alignfed.core.lora import exchange_of
from alignfed.core.pruning import Pruned, prune_by_activations, prune_by_gradients
from alignfed.errors import AlignFedError, JournalError
from alignfed.journal import RunDirectory, write_summary
from alignfed.training.calibration import CalibrationBatch
from alignfed.training.evaluate import sequence_losses
from alignfed.training.formatting import make_formatter
from alignfed.training.scorers import exact_match
from alignfed.training.sources import read_file
from alignfed.training.templates import Example

REDUCE_TO = 0.25
"""Share of harmful responses to be left, and of the likelihood of a harmful response's token."""

BY_GRADIENTS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01)
BY_ACTIVATIONS = (0.01, 0.02, 0.04, 0.08)
"""Shares of weights that are tried in turn, fewest first."""

PROTECTED = 0.2
"""Share of each row that is left alone where activations are the score (docs/log.md)."""

POSITIONS = 65_536
"""Positions whose inputs are looked at, in either set: Wanda's norms want all there are."""


@dataclass(frozen=True, slots=True)
class Sanitized:
    """A sanitised adapter.

    Attributes:
        adapter: folder of the new adapter, as PEFT reads it.
        report: the content of ``sanitize.json`` in it.
    """

    adapter: Path
    report: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Trial:
    """One way to prune that was tried: the score it went by, its share, what came out."""

    score: str
    fraction: float
    pruned: Pruned
    figures: Mapping[str, float | None]


def sanitize(
    directory: Path | str,
    harmful: Path | str,
    *,
    reduce_to: float = REDUCE_TO,
    out: Path | str | None = None,
) -> Sanitized:
    """Prune from a finished run's adapter what harmful responses depend on.

    Both scores of ``core/pruning.py`` are tried with growing shares of weights, each until the harm
    is down as wanted; the one that costs the calibration set less is kept. The evaluation set is
    only reported on.

    Args:
        directory: a finished run's; it is left as it is, but for ``out``.
        harmful: examples of what the model must not do, in the columns of the run's data: prompts,
            and the responses it should no longer give. A few dozen are enough.
        reduce_to: what may be left of harmful responses given, and of a harmful token's likelihood.
        out: folder to write; None: ``sanitized`` in the run's directory.

    Raises:
        AlignFedError: no finished run, examples that do not fit, or a folder that is in use.
    """
    if not 0.0 < reduce_to < 1.0:
        raise AlignFedError(
            f"reduce_to is {reduce_to}, must be above 0 and below 1", reduce_to=reduce_to
        )
    place = RunDirectory(Path(directory))
    folder = Path(out) if out is not None else place.root / "sanitized"
    if not (place.adapter / "adapter_config.json").is_file():
        raise JournalError(
            f"{place.root} holds no finished run: adapter/adapter_config.json is missing; give the"
            " directory of a run that has ended (alignfed resume ends one)",
            path=str(place.root),
        )
    if folder.exists():
        raise JournalError(f"{folder} exists already; name another with --out", path=str(folder))
    recipe = _as_finished(load_recipe(place.recipe), place)
    loaded = load(recipe)
    examples = _examples(recipe, loaded, Path(harmful))
    workbench = _Workbench(loaded, examples)
    before = workbench.figures(loaded.base.initial_adapter())
    limit = _Limit(before, reduce_to)
    tried = [trial for ladder in workbench.ladders() for trial in limit.climb(ladder)]
    chosen = min(tried, key=limit.rank)
    scored = [loaded.base.initial_adapter(), chosen.pruned.adapter]
    clean = [loaded.evaluator.evaluate(one, with_score=True) for one in scored]
    report = {
        "harmful_examples": len(examples),
        "reduce_to": reduce_to,
        "reached": limit.reached(chosen),
        "score": chosen.score,
        "fraction": chosen.fraction,
        "zeroed_weights": chosen.pruned.zeroed,
        "weights": sum(f.a.numel() + f.b.numel() for f in chosen.pruned.adapter.lora.values()),
        "scorer": recipe.evaluation.scorer,
        "before": {**before, "eval_loss": clean[0].loss, "eval_score": clean[0].score},
        "after": {**chosen.figures, "eval_loss": clean[1].loss, "eval_score": clean[1].score},
        "tried": [{"score": one.score, "fraction": one.fraction, **one.figures} for one in tried],
    }
    loaded.base.export(chosen.pruned.adapter, folder, loaded.base.settings.path)
    write_summary(folder / "sanitize.json", report)
    return Sanitized(folder, report)


@dataclass(frozen=True, slots=True)
class _Limit:
    """When harm is down as wanted, and which of several ways is best."""

    before: Mapping[str, float | None]
    reduce_to: float

    def climb(self, ladder: Iterable[_Trial]) -> Iterator[_Trial]:
        """Yield trials up to the first that reaches the limit."""
        for trial in ladder:
            yield trial
            if self.reached(trial):
                return

    def reached(self, trial: _Trial) -> bool:
        """Whether responses and likelihood of what is harmful are both down as wanted."""
        given, was = trial.figures["harmful_success"], self.before["harmful_success"]
        loss, at_first = trial.figures["harmful_loss"], self.before["harmful_loss"]
        assert given is not None and was is not None and loss is not None and at_first is not None
        return given <= self.reduce_to * was and loss >= at_first - math.log(self.reduce_to)

    def rank(self, trial: _Trial) -> tuple[bool, float]:
        """Order trials: those that reach the limit first, by what they cost; else by harm left."""
        reached, cost = self.reached(trial), trial.figures["calibration_loss"]
        harm = trial.figures["harmful_loss"]
        assert harm is not None
        if not reached:
            return True, -harm
        return False, float(trial.pruned.zeroed) if cost is None else cost


class _Workbench:
    """What scores and prunes a run's adapter."""

    def __init__(self, loaded: Loaded, examples: Sequence[Example]) -> None:
        """Tokenise the harmful examples, and the run's calibration set if it has one."""
        base, encoder = loaded.base, loaded.evaluator.encoder
        self.loaded = loaded
        self.examples = examples
        self.adapter = base.initial_adapter()
        self.harmful = CalibrationBatch(base, encoder, examples, max_positions=POSITIONS)
        self.useful = None
        if calibration := loaded.data.calibration:
            self.useful = CalibrationBatch(base, encoder, calibration, max_positions=POSITIONS)

    def ladders(self) -> Iterator[Iterator[_Trial]]:
        """Yield, for each score, trials with growing shares."""
        yield self._by_gradients()
        yield self._by_activations()

    def _by_gradients(self) -> Iterator[_Trial]:
        harmful = self.harmful.gradient(self.adapter)
        useful = None if self.useful is None else self.useful.gradient(self.adapter)
        for fraction in BY_GRADIENTS:
            pruned = prune_by_gradients(self.adapter, harmful, useful, fraction=fraction)
            yield _Trial("gradients", fraction, pruned, self.figures(pruned.adapter))

    def _by_activations(self) -> Iterator[_Trial]:
        harmful = self.harmful.inputs(self.adapter)
        useful = None if self.useful is None else self.useful.inputs(self.adapter)
        protected = 0.0 if useful is None else PROTECTED
        for fraction in BY_ACTIVATIONS:
            pruned = prune_by_activations(
                self.adapter, harmful, useful, fraction=fraction, protected=protected
            )
            yield _Trial("activations", fraction, pruned, self.figures(pruned.adapter))

    def figures(self, adapter: Adapter) -> dict[str, float | None]:
        """Return what an adapter does with harmful and with calibration examples."""
        return {
            "harmful_success": _share_given(self.loaded, adapter, self.examples),
            "harmful_loss": self.harmful.loss(adapter),
            "calibration_loss": None if self.useful is None else self.useful.loss(adapter),
        }


def _as_finished(recipe: Recipe, place: RunDirectory) -> Recipe:
    """Return a recipe whose model starts from the run's adapter, with nothing to be measured."""
    if exchange_of(recipe.strategy.lora).keeps:
        raise AlignFedError(
            f"strategy.lora = {recipe.strategy.lora!r} leaves every client an adapter of its own,"
            " so there is no one model to sanitise",
            lora=recipe.strategy.lora,
        )
    lora = recipe.lora.model_copy(update={"warm_start": str(place.adapter)})
    training = recipe.training.model_copy(update={"cohort_size": 1, "workers": 1})
    return recipe.model_copy(update={"lora": lora, "training": training})


def _examples(recipe: Recipe, loaded: Loaded, path: Path) -> list[Example]:
    records = read_file(path)
    settings = data_settings(recipe)
    if settings.label_column is not None:
        settings = replace(settings, label_names=loaded.data.label_names)
    return make_formatter(settings, template_of(recipe), records)(records, str(path))


def _share_given(loaded: Loaded, adapter: Adapter, examples: Sequence[Example]) -> float:
    """Return the share of harmful examples that are answered as they should not be."""
    base, evaluator = loaded.base, loaded.evaluator
    base.install(adapter)
    if base.is_classifier:
        sequences = evaluator.encoder.encode(examples)
        return float(sequence_losses(base, sequences, base.tokens_per_batch).correct.mean())
    answers = evaluator.generate(examples)
    given = [exact_match(text, one.response) for text, one in zip(answers, examples, strict=True)]
    return sum(given) / len(given)

"""Adapters scored on data nobody trains on. Losses weigh every scored token alike.

Sequences are sorted by length and run in big batches; all clients' held-out slices run together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from alignfed.core.adapter import Adapter
from alignfed.core.ports import Evaluation
from alignfed.errors import RecipeError
from alignfed.training.batches import collate, length_batches, padded_length
from alignfed.training.data import FederatedData
from alignfed.training.encoding import Encoder, Sequences, join
from alignfed.training.forward import score
from alignfed.training.generate import generate
from alignfed.training.models import BaseModel
from alignfed.training.scorers import TEXT_SCORERS
from alignfed.training.templates import Example

Scorer = Literal["none", "exact_match", "accuracy", "gsm8k"]
Floats = npt.NDArray[np.float64]

LOGIT_BYTES = 2**30
"""What one batch's fp32 logits may take; a large vocabulary makes batches smaller."""


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How adapters are scored.

    Attributes:
        scorer: ``exact_match`` and ``gsm8k`` generate greedily and compare texts, ``accuracy``
            compares classes (classifiers only), ``none`` gives the loss alone.
        max_new_tokens: longest generated text.
        score_examples: at most so many evaluation examples are generated for, the first ones.
        tokens_per_batch: tokens, filler included, that run together; None fits the device.
            Generation, whose steps see one token a row, runs four times as many.

    Raises:
        RecipeError: a value outside its range.
    """

    scorer: Scorer = "none"
    max_new_tokens: int = 32
    score_examples: int | None = None
    tokens_per_batch: int | None = None

    def __post_init__(self) -> None:
        """Check each value against its range."""
        if self.scorer not in get_args(Scorer):
            raise RecipeError(
                f"scorer is {self.scorer!r}, must be one of {', '.join(get_args(Scorer))}"
            )
        for name in ("max_new_tokens", "score_examples", "tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} is {value}, must be at least 1")


@dataclass(frozen=True, slots=True)
class SequenceLosses:
    """What each sequence of a collection scored.

    Attributes:
        sums: cross-entropy summed over the sequence's targets, in nats.
        counts: its targets.
        correct: for a classifier, whether the most likely class is right.
    """

    sums: Floats
    counts: Floats
    correct: npt.NDArray[np.bool_]


class HeldOutEvaluator:
    """Scores on the common evaluation set and on clients' slices (``core.ports.Evaluator``)."""

    def __init__(
        self,
        base: BaseModel,
        encoder: Encoder,
        data: FederatedData,
        settings: EvaluationSettings,
    ) -> None:
        """Tokenise what is scored.

        Raises:
            RecipeError: the scorer does not fit the model's task.
        """
        if settings.scorer != "none" and (settings.scorer == "accuracy") != base.is_classifier:
            raise RecipeError(
                f"scorer {settings.scorer!r} does not fit a {base.settings.task} model; use"
                f" {'accuracy' if base.is_classifier else 'exact_match, gsm8k'} or none"
            )
        self.base = base
        self.encoder = encoder
        self.settings = settings
        self._tokens_per_batch = settings.tokens_per_batch or base.tokens_per_batch
        self._examples = data.evaluation
        self._evaluation = encoder.encode(data.evaluation)
        held_out = {i: client.held_out for i, client in data.clients.items() if client.held_out}
        self._client_ids = tuple(held_out)
        self._client_sizes = [len(examples) for examples in held_out.values()]
        self._held_out = (
            join([encoder.encode(examples) for examples in held_out.values()]) if held_out else None
        )
        self._held_out_examples = [one for examples in held_out.values() for one in examples]

    def evaluate(self, adapter: Adapter, *, with_score: bool) -> Evaluation:
        """Score an adapter on the common evaluation set."""
        self.base.install(adapter)
        losses = sequence_losses(self.base, self._evaluation, self._tokens_per_batch)
        result = None
        if with_score and self.settings.scorer != "none":
            result = float(self._right(self._scored_examples(), losses).mean())
        return Evaluation(
            float(losses.sums.sum() / losses.counts.sum()), result, len(self._evaluation)
        )

    def evaluate_clients(
        self, adapter: Adapter, *, with_score: bool = False
    ) -> Mapping[int, Evaluation]:
        """Score an adapter on each client's held-out slice; no slice, no entry."""
        if self._held_out is None:
            return {}
        self.base.install(adapter)
        losses = sequence_losses(self.base, self._held_out, self._tokens_per_batch)
        owners = np.repeat(np.arange(len(self._client_ids)), self._client_sizes)
        sums = np.bincount(owners, weights=losses.sums)
        counts = np.bincount(owners, weights=losses.counts)
        scores: list[float | None] = [None] * len(self._client_ids)
        if with_score and self.settings.scorer != "none":
            right = np.bincount(owners, weights=self._right(self._held_out_examples, losses))
            scores = [float(share) for share in right / np.array(self._client_sizes)]
        return {
            client_id: Evaluation(float(sums[i] / counts[i]), scores[i], self._client_sizes[i])
            for i, client_id in enumerate(self._client_ids)
        }

    def _right(self, examples: Sequence[Example], losses: SequenceLosses) -> Floats:
        """Return 1 for each example the installed adapter gets right and 0 for others.

        ``losses`` are of the same adapter on the same examples; a classifier's are enough.
        """
        if self.settings.scorer == "accuracy":
            return losses.correct.astype(np.float64)
        right = TEXT_SCORERS[self.settings.scorer]
        answers = self.generate(examples)
        return np.array(
            [right(answer, one.response) for answer, one in zip(answers, examples, strict=True)],
            dtype=np.float64,
        )

    def generate(self, examples: Sequence[Example]) -> list[str]:
        """Return what the installed adapter answers to each prompt."""
        room = self.settings.max_new_tokens
        prompts = self.encoder.encode_prompts(examples, room)
        tokens = generate(self.base, prompts, room, 4 * self._tokens_per_batch)
        return [self.encoder.decode(one) for one in tokens]

    def _scored_examples(self) -> Sequence[Example]:
        return self._examples[: self.settings.score_examples]


def sequence_losses(base: BaseModel, sequences: Sequences, tokens_per_batch: int) -> SequenceLosses:
    """Score every sequence with the adapter that is installed."""
    sums, counts = np.zeros(len(sequences)), np.zeros(len(sequences))
    correct = np.zeros(len(sequences), dtype=np.bool_)
    limit = min(tokens_per_batch, LOGIT_BYTES // (4 * base.architecture.vocab_size))
    for rows in length_batches(sequences.lengths, limit):
        longest = int(sequences.lengths[rows].max())
        batch = collate(
            sequences,
            rows,
            pad_id=base.pad_id,
            length=padded_length(longest, base.architecture.max_positions or longest),
            classify=base.is_classifier,
        ).to(base.device)
        with torch.no_grad():
            scored = score(base, batch)
        owners = rows[batch.rows.cpu().numpy()]
        np.add.at(sums, owners, scored.losses.double().cpu().numpy())
        np.add.at(counts, owners, 1.0)
        if base.is_classifier:
            correct[owners] = (scored.logits.argmax(dim=-1) == batch.targets).cpu().numpy()
    return SequenceLosses(sums, counts, correct)

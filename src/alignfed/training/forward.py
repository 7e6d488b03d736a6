"""One batch through the base and its installed adapter: logits where they are scored, features.

Features are what reaches the output head: for a language model at each scored position, for a
classifier once a text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from alignfed.training.batches import Batch
from alignfed.training.models import BaseModel


@dataclass(frozen=True, slots=True)
class Scored:
    """What a forward pass gives.

    Attributes:
        losses: cross-entropy of each target in nats, fp32, shape ``(N,)``.
        logits: shape ``(N, classes)``.
        features: shape ``(N, hidden_size)``.
    """

    losses: Tensor
    logits: Tensor
    features: Tensor


def score(base: BaseModel, batch: Batch, *, masked: bool = True) -> Scored:
    """Run a batch and score its targets.

    Args:
        base: with the adapter to be scored installed.
        batch: on the base's device.
        masked: whether filler is hidden from attention. A causal model never looks right, where
            the filler is, so it computes the same without, and faster.
    """
    model = base.peft_model.get_base_model()
    base.tap.select = None if base.is_classifier else AtPositions(batch.positions)
    try:
        with base.autocast():
            output = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask if masked else None
            )
        features = base.tap.features
    finally:
        base.tap.select = base.tap.features = None
    assert features is not None  # the head always runs
    logits = output.logits.reshape(-1, output.logits.shape[-1])
    losses = functional.cross_entropy(logits.float(), batch.targets, reduction="none")
    if not base.is_classifier:
        features = features.squeeze(0)
    elif features.ndim == 3:
        # Decoders pool after the head and take the last token; encoders hand over every
        # position and their head takes the first.
        flat = features.reshape(-1, features.shape[-1])
        last = base.head_name.rpartition(".")[2] == "score"
        features = flat[batch.positions] if last else features[:, 0]
    return Scored(losses, logits, features)


@contextlib.contextmanager
def without_adapter(base: BaseModel) -> Iterator[None]:
    """Make the base compute as if nothing had been trained; nothing is recorded for gradients."""
    with torch.no_grad(), base.peft_model.disable_adapter():
        yield


@dataclass(frozen=True, slots=True)
class AtPositions:
    """Narrows ``(B, T, hidden)`` to ``(1, N, hidden)``."""

    positions: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the hidden states of these positions alone."""
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, self.positions).unsqueeze(0)

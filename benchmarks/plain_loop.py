"""Fine-tuning as one would write it with PEFT and torch: what benchmarks compare with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignfed.training.batches import Batch
from alignfed.training.local_settings import LocalSettings


def labels_of(batch: Batch) -> Tensor:
    """Return a batch's labels as Transformers wants them: -100 where nothing is scored."""
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.positions + 1] = batch.targets
    return labels


def train_plainly(
    model: Any,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    settings: LocalSettings,
) -> list[float]:
    """Make one step on each ``(ids, attention mask, labels)``; return the loss of each.

    Of the settings those of AdamW and clipping count.
    """
    optimiser = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    losses = []
    for ids, mask, labels in batches:
        optimiser.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimiser.step()
        losses.append(loss.item())
    return losses

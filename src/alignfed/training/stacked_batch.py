"""The batches of K clients as one: equal numbers of rows a client, one length, targets weighted.

A target weighs one over its client's targets, so that the weighted sum of losses is the sum of the
clients' means: no client's gradient sees another's targets. Filler rows and filler targets weigh
nothing; a filler row shows one token, as a row that shows none has no defined attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from alignfed.training.batches import Batch


@dataclass(frozen=True, slots=True)
class StackedBatch:
    """The batches of ``count`` clients.

    Attributes:
        batch: all of them, client by client, ``count * B`` rows.
        count: clients.
        clients: whose each target is, shape ``(N,)``.
        weights: of each target, shape ``(N,)``.
        num_tokens: tokens of the clients' own batches, without what stacking added.
    """

    batch: Batch
    count: int
    clients: Tensor
    weights: Tensor
    num_tokens: int

    def to(self, device: torch.device) -> StackedBatch:
        """Return the batch on a device."""
        if device.type == "cpu":
            return self
        return StackedBatch(
            self.batch.to(device),
            self.count,
            self.clients.to(device, non_blocking=True),
            self.weights.to(device, non_blocking=True),
            self.num_tokens,
        )

    def per_client(self, losses: Tensor) -> Tensor:
        """Return each client's mean over its own targets, shape ``(count,)``."""
        return losses.new_zeros(self.count).index_add_(0, self.clients, losses * self.weights)


def stack_batches(
    batches: Sequence[Batch], *, pad_id: int, classify: bool, even: bool, length: int | None = None
) -> StackedBatch:
    """Return one batch for several clients, on the CPU.

    Args:
        batches: one a client.
        pad_id: filler token.
        classify: whether every row has exactly one target, as a classifier scores.
        even: give every client as many targets as the one with most, for a head that is trained
            and must see equal parts.
        length: tokens a row at least; by default the longest of the batches.
    """
    count = len(batches)
    rows = max(len(one.input_ids) for one in batches)
    width = max(length or 0, *(one.input_ids.shape[1] for one in batches))
    ids = torch.full((count, rows, width), pad_id)
    mask = torch.zeros(count, rows, width, dtype=torch.int64)
    mask[..., 0] = 1
    targets_each = [len(one.targets) for one in batches]
    room = [rows if classify else max(targets_each)] * count if classify or even else targets_each
    parts = []
    for client, one in enumerate(batches):
        own_rows, own_width = one.input_ids.shape
        ids[client, :own_rows, :own_width] = one.input_ids
        mask[client, :own_rows, :own_width] = one.attention_mask
        first_row = client * rows
        row, column = one.positions // own_width, one.positions % own_width
        targets = len(one.targets)
        filler = room[client] - targets
        positions = (first_row + row) * width + column
        if filler and classify:
            empty_rows = torch.arange(first_row + own_rows, first_row + rows)
            positions = torch.cat([positions, empty_rows * width])
        else:
            positions = functional.pad(positions, (0, filler), value=first_row * width)
        parts.append(
            (
                positions,
                functional.pad(one.targets, (0, filler)),
                functional.pad(one.rows + first_row, (0, filler), value=first_row),
                functional.pad(torch.full((targets,), 1.0 / targets), (0, filler)),
            )
        )
    positions, targets_all, owners, weights = (
        torch.cat(every) for every in zip(*parts, strict=True)
    )
    return StackedBatch(
        Batch(ids.view(-1, width), mask.view(-1, width), positions, targets_all, owners),
        count,
        torch.arange(count).repeat_interleave(torch.tensor(room)),
        weights,
        sum(one.num_tokens for one in batches),
    )

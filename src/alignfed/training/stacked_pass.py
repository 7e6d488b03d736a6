"""One forward and backward pass of K clients, and the check that a model allows it.

Whether a model can be stacked is found by comparison, not by its name: the losses and gradients of
two random adapters, stacked and one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter
from alignfed.training.batches import Batch
from alignfed.training.local import target_losses
from alignfed.training.models import BaseModel
from alignfed.training.stacked import Leaves, StackedAdapters
from alignfed.training.stacked_batch import StackedBatch, stack_batches
from alignfed.training.stacked_layers import NotStackable, StackedForward

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest relative difference of losses and gradients. A wrong pairing gives one near 1; what is
left to rounding stays far below."""

EXTRA_FILLER = 8
"""Filler appended for the comparison, so that a model that minds it is found out."""


class StackedPass:
    """What every step of a cohort does before its optimiser.

    Attributes:
        base: the frozen base.
        penalty: strength of the representation penalty.
        masked: whether filler is hidden from attention.
    """

    def __init__(self, base: BaseModel, penalty: float) -> None:
        """Prepare; nothing is computed."""
        self.base = base
        self.penalty = penalty
        self.masked = True
        # Only a head that is trained must see its clients' positions in equal parts.
        self._even = any(
            name == base.head_name or name.startswith(f"{base.head_name}.")
            for name in (*base.lora_layers, *base.dense_owners)
        )

    def stack(self, adapters: Sequence[Adapter]) -> StackedAdapters:
        """Return adapters as rows of one buffer.

        Raises:
            ModelError: one does not fit the base.
        """
        for adapter in adapters:
            self.base.require_fit(adapter.to(torch.float32).layout)
        return StackedAdapters(adapters, self.base.device)

    def collate(self, batches: Sequence[Batch], *, extra_filler: int = 0) -> StackedBatch:
        """Return the batches of several clients as one, on the base's device."""
        longest = max(one.input_ids.shape[1] for one in batches) + extra_filler
        most = self.base.architecture.max_positions
        return stack_batches(
            batches,
            pad_id=self.base.pad_id,
            classify=self.base.is_classifier,
            even=self._even,
            length=longest if most is None else min(longest, most),
        ).to(self.base.device)

    def backward(self, stacked: StackedBatch, leaves: Leaves) -> Tensor:
        """Overwrite the gradients of the leaves in use; return each client's cross-entropy."""
        losses, objectives = target_losses(
            self.base, stacked.batch, self.penalty, masked=self.masked
        )
        # Each client's mean depends on its own leaves alone: the gradients of the sum are theirs.
        total = (objectives * stacked.weights).sum()
        found = torch.autograd.grad(
            total, leaves.tensors, allow_unused=True, materialize_grads=True
        )
        torch._foreach_copy_(list(leaves.gradients), list(found))
        return stacked.per_client(losses.detach())


def find_obstacle(one_pass: StackedPass, adapter: Adapter, batches: Sequence[Batch]) -> str | None:
    """Return why clients cannot be stacked on this base, None if they can.

    Also decides whether the pass needs an attention mask.

    Args:
        one_pass: of the base.
        adapter: one that fits; two random neighbours of it are compared.
        batches: two.
    """
    if one_pass.base.dropout > 0:
        return "LoRA dropout is on, and its draws must not depend on who trains together"
    adapters = [_shaken(adapter, seed) for seed in range(len(batches))]
    expected = [_alone(one_pass, *pair) for pair in zip(adapters, batches, strict=True)]
    worst = None
    # Without a mask, filler must not matter: true of causal models alone, and faster there.
    for one_pass.masked in (False, True):
        worst = _worst_difference(one_pass, adapters, batches, expected)
        if worst is not None and worst < TOLERANCE[one_pass.base.settings.dtype]:
            return None
    if worst is None:
        return "this model's layers cannot be given equal parts by client"
    return f"this model's numbers change by {worst:.1e} when clients are stacked"


def _alone(one_pass: StackedPass, adapter: Adapter, batch: Batch) -> tuple[float, Tensor]:
    base = one_pass.base
    base.install(adapter)
    base.gradients.zero_()
    losses, objectives = target_losses(base, batch.to(base.device), one_pass.penalty)
    objectives.mean().backward()
    return float(losses.detach().mean()), base.gradients.to("cpu", copy=True)


def _worst_difference(
    one_pass: StackedPass,
    adapters: Sequence[Adapter],
    batches: Sequence[Batch],
    expected: Sequence[tuple[float, Tensor]],
) -> float | None:
    """Return the largest relative difference of losses and gradients, None if incomparable."""
    stack = one_pass.stack(adapters)
    leaves = stack.leaves(len(stack))
    batch = one_pass.collate(batches, extra_filler=EXTRA_FILLER)
    try:
        with StackedForward(one_pass.base) as forward:
            forward.use(leaves)
            losses = one_pass.backward(batch, leaves).tolist()
    except NotStackable:
        return None
    stack.values.copy_(stack.gradients)
    worst = 0.0
    for row, ((loss, gradients), read) in enumerate(zip(expected, stack.read(), strict=True)):
        found = read.buffers[torch.float32]
        off = (found - gradients).norm() / gradients.norm().clamp(min=1e-30)
        for one in (float(off), abs(losses[row] - loss) / max(abs(loss), 1e-6)):
            worst = max(worst, one if math.isfinite(one) else math.inf)
    return worst


def _shaken(adapter: Adapter, seed: int) -> Adapter:
    """Return a fp32 adapter with noise on every element, so that no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    plain = adapter.to(torch.float32)
    return Adapter(
        plain.layout,
        {
            dtype: buffer + 0.02 * torch.randn(buffer.shape, generator=generator)
            for dtype, buffer in plain.buffers.items()
        },
    )

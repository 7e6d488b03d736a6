"""Factor mean: A and B are averaged as vectors, each by itself (FedIT).

Zhang et al. 2023, "Towards Building the Federated GPT" (arXiv 2305.05644), section 3. The mean of
factors is not the mean of products; the difference is small while all updates share one base.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, pieces, require_same_layout

WAITING_UPDATES = 4
"""Large updates that are added together, so that the sum is read and written once for all."""

WAITING_BYTES = 1 << 20
"""Small ones may wait in any number until they take this much."""


@dataclass(slots=True)
class FactorSum:
    """``sum_j c_j update_j`` so far, and how much of each base to take off it at the end.

    Attributes:
        totals: the sum, fp32, one tensor for each flat buffer; empty before the first addition.
        bases: by version.
        shares: by version, the sum of its c_j.
        waiting: updates not added yet, with their coefficients.
        waiting_bytes: their size.
    """

    totals: list[Tensor] = field(default_factory=list)
    bases: dict[int, Adapter] = field(default_factory=dict)
    shares: dict[int, float] = field(default_factory=dict)
    waiting: list[tuple[float, Adapter]] = field(default_factory=list)
    waiting_bytes: int = 0


@dataclass(frozen=True, slots=True)
class FactorMean:
    """``A <- A + sum_j c_j (A_j - A_base(j))``, the same for B and for dense tensors."""

    name = "factor"

    def combine(self, current: Adapter, terms: Sequence[tuple[float, Adapter, Adapter]]) -> Adapter:
        """Return ``current + sum_j c_j (update_j - base_j)``, element by element, summed in fp32.

        Args:
            current: the adapter to move; the result has its layout.
            terms: ``(c_j, update_j, base_j)``.

        Raises:
            AdapterError: the layouts differ; factors of unequal rank cannot be added.
        """
        for _, update, base in terms:
            require_same_layout(current, update)
            require_same_layout(current, base)
        buffers = {}
        for dtype, buffer in current.buffers.items():
            found = torch.empty_like(buffer)
            parts = [
                (c, pieces(update.buffers[dtype]), pieces(base.buffers[dtype]))
                for c, update, base in terms
            ]
            for number, (old, target) in enumerate(zip(pieces(buffer), pieces(found), strict=True)):
                step = torch.zeros_like(old, dtype=torch.float32)
                for coefficient, updates, bases in parts:
                    # The difference first: an update equal to its base then adds an exact zero.
                    delta = updates[number].float() - bases[number].float()
                    step.add_(delta, alpha=coefficient)
                target.copy_(step.add_(old.float()))
            buffers[dtype] = found
        return Adapter(current.layout, buffers)

    def add(
        self,
        total: FactorSum | None,
        coefficient: float,
        update: Adapter,
        base: Adapter,
        base_version: int,
    ) -> FactorSum:
        """Add ``coefficient * (update - base)`` to a sum, begun where there is none.

        Memory is one fp32 adapter, a few that wait, and references to the bases, however many
        updates are added. Bases are taken off once, in ``move``.

        Raises:
            AdapterError: the layouts differ; factors of unequal rank cannot be added.
        """
        if update.layout is not base.layout:
            require_same_layout(update, base)
        if total is None:
            total = FactorSum()
        shares = total.shares
        if base_version in shares:
            shares[base_version] += coefficient
        else:
            total.bases[base_version] = base
            shares[base_version] = coefficient
        total.waiting.append((coefficient, update))
        total.waiting_bytes += update.layout.size_bytes
        if total.waiting_bytes >= WAITING_BYTES and len(total.waiting) >= WAITING_UPDATES:
            _add_waiting(total)
        return total

    def move(self, current: Adapter, total: FactorSum | None, scale: float) -> Adapter:
        """Return ``current + scale * total``, summed in fp32; the total is used up.

        Raises:
            AdapterError: the layouts differ; factors of unequal rank cannot be added.
        """
        if total is None:
            return current
        _add_waiting(total)
        for version, base in total.bases.items():
            require_same_layout(current, base)
            total.waiting.append((-total.shares[version], base))
        _add_waiting(total)
        buffers = {}
        for step, dtype in zip(total.totals, current.layout.sizes, strict=True):
            buffers[dtype] = torch.add(current.buffers[dtype], step, alpha=scale).to(dtype)
        return Adapter(current.layout, buffers)


def _add_waiting(total: FactorSum) -> None:
    """Add what waits, piece by piece, so that a piece of the sum stays in cache meanwhile."""
    if not total.waiting:
        return
    sizes = total.waiting[0][1].layout.sizes
    if not total.totals:
        total.totals = [torch.zeros(count, dtype=torch.float32) for count in sizes.values()]
    for sums, dtype in zip(total.totals, sizes, strict=True):
        buffers = [adapter.buffers[dtype] for _, adapter in total.waiting]
        if len(buffers) > WAITING_UPDATES and sums.numel() * len(buffers) <= WAITING_BYTES:
            rows = torch.stack(buffers).float()
            coefficients = array("f", [coefficient for coefficient, _ in total.waiting])
            sums.addmv_(rows.T, torch.frombuffer(coefficients, dtype=torch.float32))
            continue
        added = [pieces(buffer) for buffer in buffers]
        for number, piece in enumerate(pieces(sums)):
            for (coefficient, _), parts in zip(total.waiting, added, strict=True):
                piece.add_(parts[number], alpha=coefficient)
    total.waiting.clear()
    total.waiting_bytes = 0

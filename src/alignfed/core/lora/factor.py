"""Factor mean: A and B are averaged as vectors, each by itself (FedIT).

Zhang et al. 2023, "Towards Building the Federated GPT" (arXiv 2305.05644), section 3. The mean of
factors is not the mean of products; the difference is small while all updates share one base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alignfed.core.adapter import Adapter, require_same_layout


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
            step = torch.zeros_like(buffer, dtype=torch.float32)
            for coefficient, update, base in terms:
                # The difference first: an update equal to its base then adds an exact zero.
                delta = update.buffers[dtype].float() - base.buffers[dtype].float()
                step.add_(delta, alpha=coefficient)
            buffers[dtype] = (buffer.float() + step).to(dtype)
        return Adapter(current.layout, buffers)

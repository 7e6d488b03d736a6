"""Product space: what the updates did to the model is summed exactly, then re-factored.

The innovation of an upload, ``s' B'A' - s B_base A_base``, does not depend on how the current model
happens to be factored, so a stale base costs no cross terms
``delta_B (A_t - A_base) + (B_t - B_base) delta_A``. Sums of products of any ranks are exact by
stacking (Wang et al. 2024, "FLoRA", arXiv 2409.05976, section 3); only the return to the current
rank rounds, to the nearest product of that rank (Bai et al. 2024, "FlexLoRA", arXiv 2402.11505).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from alignfed.core.adapter import Adapter
from alignfed.core.algebra import refactor, stack


@dataclass(slots=True)
class ProductTerms:
    """Terms of a sum, all of which are needed to re-factor it.

    Attributes:
        terms: ``(c_j, update_j, base_j)``.
    """

    terms: list[tuple[float, Adapter, Adapter]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ProductSum:
    """``s BA <- nearest of current rank to  s BA + sum_j c_j (s_j B_j A_j - base product)``."""

    name = "product"

    def combine(self, current: Adapter, terms: Sequence[tuple[float, Adapter, Adapter]]) -> Adapter:
        """Return ``current + sum_j c_j (update_j - base_j)``, summed as products.

        Equal adapters are stacked once with the sum of their coefficients, so that the stacked
        rank grows with the number of different bases and updates not moved at all vanish exactly.

        Args:
            current: the adapter to move; the result has its layout.
            terms: ``(c_j, update_j, base_j)``, of any ranks.

        Raises:
            AdapterError: names or outer sizes differ.
        """
        # Keyed by content, not by identity: a run that was resumed holds copies of its bases and
        # must still add in the same order.
        found: dict[str, tuple[Adapter, list[float]]] = {current.checksum: (current, [1.0])}
        for coefficient, update, base in terms:
            found.setdefault(update.checksum, (update, []))[1].append(coefficient)
            found.setdefault(base.checksum, (base, []))[1].append(-coefficient)
        merged = [(math.fsum(parts), adapter) for adapter, parts in found.values()]
        merged = [(coefficient, adapter) for coefficient, adapter in merged if coefficient != 0.0]
        if not merged:
            merged = [(0.0, current)]
        coefficient, adapter = merged[0]
        if len(merged) == 1 and coefficient == 1.0 and adapter.layout == current.layout:
            return adapter
        return refactor(stack(merged), current)

    def add(
        self,
        total: ProductTerms | None,
        coefficient: float,
        update: Adapter,
        base: Adapter,
        base_version: int,
    ) -> ProductTerms:
        """Keep a term: products are only summed by stacking all of them."""
        total = total or ProductTerms()
        total.terms.append((coefficient, update, base))
        return total

    def move(self, current: Adapter, total: ProductTerms | None, scale: float) -> Adapter:
        """Return ``current + scale * total``.

        Raises:
            AdapterError: names or outer sizes differ.
        """
        terms = [] if total is None else total.terms
        return self.combine(current, [(scale * c, update, base) for c, update, base in terms])

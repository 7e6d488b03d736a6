"""How LoRA factors combine, independent of when updates arrive: one file a rule, one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from alignfed.core.lora.factor import FactorMean
from alignfed.core.lora.product import ProductSum
from alignfed.core.ports import LoraRule
from alignfed.errors import RuleError

Space: TypeAlias = Literal["factor", "product"]
"""Where sums are taken: over the elements of A and B, or over products ``B A``."""


@dataclass(frozen=True, slots=True)
class LoraEntry:
    """One row of the table.

    Attributes:
        make: returns the rule.
        space: where the rule's sums are taken.
        mixed_ranks: whether clients may train at ranks other than the server's.
        description: one line.
        source: where it was published.
    """

    make: Callable[[], LoraRule]
    space: Space
    mixed_ranks: bool
    description: str
    source: str


LORA_RULES: Mapping[str, LoraEntry] = {
    "factor": LoraEntry(
        FactorMean,
        space="factor",
        mixed_ranks=False,
        description="A and B are averaged separately (FedIT)",
        source="Zhang et al. 2023, arXiv 2305.05644",
    ),
    "product": LoraEntry(
        ProductSum,
        space="product",
        mixed_ranks=True,
        description="products are summed exactly and re-factored to the server's rank",
        source="Bai et al. 2024, arXiv 2402.11505; Wang et al. 2024, arXiv 2409.05976",
    ),
}
"""Every LoRA rule by the name that recipes use."""


def make_lora_rule(name: str) -> LoraRule:
    """Return the LoRA rule of that name.

    Raises:
        RuleError: there is none.
    """
    if name not in LORA_RULES:
        raise RuleError(
            f"no LoRA rule is called {name!r}; choose one of {', '.join(LORA_RULES)}", name=name
        )
    return LORA_RULES[name].make()


def space_of(rule: LoraRule) -> Space:
    """Return where a rule's sums are taken (a rule outside the table: its factors)."""
    entry = LORA_RULES.get(rule.name)
    return entry.space if entry else "factor"


__all__ = [
    "LORA_RULES",
    "FactorMean",
    "LoraEntry",
    "ProductSum",
    "Space",
    "make_lora_rule",
    "space_of",
]

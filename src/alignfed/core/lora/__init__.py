"""How LoRA factors combine, independent of when updates arrive: one file a rule, one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from alignfed.core.lora import fedsa, ffa, flexlora, flora, hetlora
from alignfed.core.lora.compatibility import LINEAR, incompatibility
from alignfed.core.lora.exchange import WHOLE, Exchange, Part
from alignfed.core.lora.factor import FactorMean
from alignfed.core.lora.fedex import ExactResidual
from alignfed.core.lora.fedrot import RotatedFactors
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
        description: one line.
        source: where it was published.
        exchange: what travels between server and clients, and what is trained.
        folds: whether the base weights change, so that an adapter's rank grows.
        separable: whether ``(u - b) + (b - x)`` adds the same as ``u - x``; a rule that weighs
            updates by what they hold tells them apart.
    """

    make: Callable[[], LoraRule]
    space: Space
    description: str
    source: str
    exchange: Exchange = WHOLE
    folds: bool = False
    separable: bool = True

    @property
    def mixed_ranks(self) -> bool:
        """Whether clients may train at ranks below the server's."""
        return self.exchange.cut is not None


LORA_RULES: Mapping[str, LoraEntry] = {
    "factor": LoraEntry(
        FactorMean,
        space="factor",
        description="A and B are averaged separately (FedIT)",
        source="Zhang et al. 2023, arXiv 2305.05644",
    ),
    "product": LoraEntry(
        ProductSum,
        space="product",
        description="products are summed exactly and re-factored to the server's rank",
        source="Bai et al. 2024, arXiv 2402.11505; Wang et al. 2024, arXiv 2409.05976",
    ),
    "ffa": LoraEntry(
        ffa.FrozenA,
        space="factor",
        description="A is frozen everywhere; B alone is trained and uploaded (FFA-LoRA)",
        source="Sun et al. 2024, arXiv 2403.12313",
        exchange=ffa.EXCHANGE,
    ),
    "fedsa": LoraEntry(
        fedsa.SharedA,
        space="factor",
        description="A is shared, B stays with its client; judged per client (FedSA-LoRA)",
        source="Guo et al. 2024, arXiv 2410.01463",
        exchange=fedsa.EXCHANGE,
    ),
    "fedex": LoraEntry(
        ExactResidual,
        space="product",
        description="factor mean, and its exact residual into the base weights (FedEx-LoRA)",
        source="Singhal et al. 2024, arXiv 2410.09432",
        folds=True,
    ),
    "flora": LoraEntry(
        flora.Stacking,
        space="product",
        description="stacked into the base weights, fresh factors for each task (FLoRA)",
        source="Wang et al. 2024, arXiv 2409.05976",
        exchange=flora.EXCHANGE,
        folds=True,
    ),
    "flexlora": LoraEntry(
        flexlora.RedistributedProducts,
        space="product",
        description="products summed, each client sent its nearest rank (FlexLoRA)",
        source="Bai et al. 2024, arXiv 2402.11505",
        exchange=flexlora.EXCHANGE,
    ),
    "hetlora": LoraEntry(
        hetlora.PaddedFactors,
        space="factor",
        description="factors zero-padded, weighted by Frobenius norm (HetLoRA)",
        source="Cho et al. 2024, arXiv 2401.06432",
        exchange=hetlora.EXCHANGE,
        separable=False,
    ),
    "fedrot": LoraEntry(
        RotatedFactors,
        space="factor",
        description="factors rotated to the server's by Procrustes, then averaged (FedRot-LoRA)",
        source="Zhang et al. 2026, arXiv 2602.23638",
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


def exchange_of(name: str) -> Exchange:
    """Return what travels under the LoRA rule of that name.

    Raises:
        RuleError: there is none.
    """
    make_lora_rule(name)
    return LORA_RULES[name].exchange


def space_of(rule: LoraRule) -> Space:
    """Return where a rule's sums are taken (a rule outside the table: its factors)."""
    entry = LORA_RULES.get(rule.name)
    return entry.space if entry else "factor"


def is_linear(rule: LoraRule) -> bool:
    """Return whether a rule adds elements of A and B as they are, in a ``FactorSum``."""
    return rule.name in LINEAR


def is_separable(rule: LoraRule) -> bool:
    """Return whether a rule's sums may be split at a base (a rule outside the table: they may)."""
    entry = LORA_RULES.get(rule.name)
    return entry.separable if entry else True


__all__ = [
    "LORA_RULES",
    "Exchange",
    "FactorMean",
    "LoraEntry",
    "Part",
    "ProductSum",
    "Space",
    "exchange_of",
    "incompatibility",
    "is_linear",
    "is_separable",
    "make_lora_rule",
    "space_of",
]

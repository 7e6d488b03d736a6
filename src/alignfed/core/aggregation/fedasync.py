"""FedAsync: the server mixes each client's model into its own.

Xie, Koyejo and Gupta 2019, "Asynchronous Federated Optimization" (arXiv 1903.03934), Algorithm 1,
as published: models are mixed, not differences added. The published rule has a buffer of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from alignfed.core.adapter import Adapter
from alignfed.core.aggregation.held import HeldUpdates, held_pairs, hold
from alignfed.core.aggregation.settings import check_settings, choice, number, whole
from alignfed.core.aggregation.sizes import combining_bytes, require_updates
from alignfed.core.instructions import ServerWork
from alignfed.core.ports import BufferedUpdate, Flush, LoraRule, Step
from alignfed.core.staleness import DISCOUNTS, Discount, discount


@dataclass(frozen=True, slots=True)
class FedAsyncState:
    """FedAsync remembers nothing: the mixing rate is computed afresh for every update."""


@dataclass(frozen=True, slots=True)
class FedAsync:
    """``x <- (1 - a_i) x + a_i w_i`` with ``a_i = a sigma(s_i)``, for each buffered update in turn.

    In turn means by task id, so that the order of arrival within one flush does not matter. Mixing
    K models one after the other is one weighted sum, ``x + sum_i e_i (w_i - x)`` with
    ``e_i = a_i prod_{j after i} (1 - a_j)``; the ``e_i`` are the weights on record. The base of an
    update plays no part.
    """

    mixing: float = number(
        0.6, "a, mixing rate of a fresh update", low=0, high=1, low_included=False
    )
    discount: str = choice("polynomial", DISCOUNTS, "sigma, how staleness is discounted")
    exponent: float = number(0.5, "p of (1 + s)^-p (polynomial)", low=0)
    hinge_slope: float = number(10.0, "h of 1 / (h (s - b) + 1) (hinge)", low=0, low_included=False)
    hinge_start: int = whole(6, "b, staleness up to which nothing is discounted (hinge)", low=0)

    name = "fedasync"
    synchronous = False

    def __post_init__(self) -> None:
        """Refuse settings outside their ranges."""
        check_settings(self)

    def init(self, adapter: Adapter) -> FedAsyncState:
        """Return the state before the first flush."""
        return FedAsyncState()

    def receive(
        self,
        gathered: HeldUpdates | None,
        entry: BufferedUpdate,
        update: Adapter,
        base: Adapter,
        lora: LoraRule,
    ) -> HeldUpdates:
        """Keep the update until the flush: its weight depends on later tasks."""
        return hold(gathered, update, base)

    def apply(
        self, state: FedAsyncState, gathered: HeldUpdates | None, flush: Flush
    ) -> tuple[FedAsyncState, Step]:
        """Return the state and the server step.

        Raises:
            RuleError: the flush holds no updates.
        """
        require_updates(flush)
        positions = sorted(range(len(flush.updates)), key=lambda i: flush.updates[i].task_id)
        weights = [0.0] * len(positions)
        unmixed = 1.0
        for position in reversed(positions):
            rate = self.mixing * self._discount(flush.updates[position].staleness)
            weights[position] = rate * unmixed
            unmixed *= 1.0 - rate
        terms = [
            (weight, update, flush.adapter)
            for weight, (update, _) in zip(weights, held_pairs(gathered), strict=True)
        ]
        adapter = flush.lora.combine(flush.adapter, terms)
        return state, Step(adapter, tuple(weights), work=ServerWork(combining_bytes(flush)))

    def _discount(self, staleness: int) -> float:
        return discount(
            cast(Discount, self.discount),
            staleness,
            exponent=self.exponent,
            slope=self.hinge_slope,
            start=self.hinge_start,
        )

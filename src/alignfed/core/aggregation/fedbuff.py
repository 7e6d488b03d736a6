"""FedBuff: a buffered mean of discounted client updates.

Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation" (arXiv 2106.06639),
Algorithm 1; the discount ``(1 + s)^-1/2`` is from its experiments. The sum is divided by the number
of updates, not by the sum of the discounts: staleness shrinks the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignfed.core.adapter import Adapter
from alignfed.core.aggregation.settings import check_settings, choice, number, whole
from alignfed.core.aggregation.sizes import combining_bytes, require_updates
from alignfed.core.instructions import ServerWork
from alignfed.core.ports import BufferedUpdate, Flush, LoraRule, Step
from alignfed.core.staleness import DISCOUNTS, discount


@dataclass(frozen=True, slots=True)
class FedBuffState:
    """FedBuff remembers nothing between flushes."""


@dataclass(frozen=True, slots=True)
class FedBuff:
    """``x <- x + (eta / K) sum_i sigma(s_i) (w_i - base_i)``, each update against its own base."""

    server_step: float = number(1.0, "eta", low=0, low_included=False)
    discount: str = choice("polynomial", DISCOUNTS, "sigma, how staleness is discounted")
    exponent: float = number(0.5, "p of (1 + s)^-p (polynomial)", low=0)
    hinge_slope: float = number(10.0, "h of 1 / (h (s - b) + 1) (hinge)", low=0, low_included=False)
    hinge_start: int = whole(6, "b, staleness up to which nothing is discounted (hinge)", low=0)

    name = "fedbuff"
    synchronous = False

    def __post_init__(self) -> None:
        """Refuse settings outside their ranges."""
        check_settings(self)

    def init(self, adapter: Adapter) -> FedBuffState:
        """Return the state before the first flush."""
        return FedBuffState()

    def receive(
        self, gathered: Any, entry: BufferedUpdate, update: Adapter, base: Adapter, lora: LoraRule
    ) -> Any:
        """Add ``sigma(s_i) (w_i - base_i)`` to the sum."""
        if entry.norm == 0:  # it moved nothing, and adding nothing must leave every bit as it is
            return gathered
        return lora.add(gathered, self._discount(entry.staleness), update, base, entry.base_version)

    def apply(self, state: FedBuffState, gathered: Any, flush: Flush) -> tuple[FedBuffState, Step]:
        """Return the state and the server step.

        Raises:
            RuleError: the flush holds no updates.
        """
        require_updates(flush)
        scale = self.server_step / len(flush.updates)
        ages = [entry.staleness for entry in flush.updates]
        weight_at = {age: scale * self._discount(age) for age in set(ages)}
        weights = tuple([weight_at[age] for age in ages])
        adapter = flush.lora.move(flush.adapter, gathered, scale)
        return state, Step(adapter, weights, work=ServerWork(combining_bytes(flush)))

    def _discount(self, staleness: int) -> float:
        return discount(self.discount, staleness, self.exponent, self.hinge_slope, self.hinge_start)

"""FedAvg: the mean of the cohort's models, once every member has reported.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data"
(arXiv 1602.05629), Algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from alignfed.core.adapter import Adapter
from alignfed.core.aggregation.settings import check_settings, choice, number
from alignfed.core.aggregation.sizes import combining_bytes, require_updates
from alignfed.core.instructions import ServerWork
from alignfed.core.ports import BufferedUpdate, Flush, LoraRule, Step


@dataclass(frozen=True, slots=True)
class FedAvgState:
    """FedAvg remembers nothing."""


@dataclass(frozen=True, slots=True)
class FedAvg:
    """``x <- x + eta sum_i p_i (w_i - x)``, with ``p_i`` by examples or uniform.

    At ``eta = 1`` that is ``sum_i p_i w_i``: in a round every base is the current model.
    """

    weighting: str = choice("examples", ("examples", "uniform"), "what p_i is proportional to")
    server_step: float = number(1.0, "eta", low=0, low_included=False)

    name = "fedavg"
    synchronous = True

    def __post_init__(self) -> None:
        """Refuse settings outside their ranges."""
        check_settings(self)

    def init(self, adapter: Adapter) -> FedAvgState:
        """Return the state before the first flush."""
        return FedAvgState()

    def receive(
        self, gathered: Any, entry: BufferedUpdate, update: Adapter, base: Adapter, lora: LoraRule
    ) -> Any:
        """Add ``n_i (w_i - x)``, or ``w_i - x``, to the sum."""
        if entry.norm == 0:  # it moved nothing, and adding nothing must leave every bit as it is
            return gathered
        return lora.add(gathered, self._count(entry), update, base, entry.base_version)

    def apply(self, state: FedAvgState, gathered: Any, flush: Flush) -> tuple[FedAvgState, Step]:
        """Return the state and the server step.

        Raises:
            RuleError: the flush holds no updates.
        """
        require_updates(flush)
        counts = [self._count(entry) for entry in flush.updates]
        scale = self.server_step / math.fsum(counts)
        adapter = flush.lora.move(flush.adapter, gathered, scale)
        weights = tuple(scale * count for count in counts)
        return state, Step(adapter, weights, work=ServerWork(combining_bytes(flush)))

    def _count(self, entry: BufferedUpdate) -> float:
        return float(entry.num_examples) if self.weighting == "examples" else 1.0

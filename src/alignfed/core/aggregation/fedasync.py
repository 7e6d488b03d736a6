"""FedAsync: the server mixes each client's model into its own.

Xie, Koyejo and Gupta 2019, "Asynchronous Federated Optimization" (arXiv 1903.03934), Algorithm 1,
as published: models are mixed, not differences added. The published rule has a buffer of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from alignfed.core.adapter import Adapter
from alignfed.core.aggregation.settings import check_settings, choice, number, whole
from alignfed.core.aggregation.sizes import combining_bytes, require_updates
from alignfed.core.instructions import ServerWork
from alignfed.core.lora import is_separable
from alignfed.core.ports import BufferedUpdate, Flush, LoraRule, Step
from alignfed.core.staleness import DISCOUNTS, discount


@dataclass(frozen=True, slots=True)
class FedAsyncState:
    """FedAsync remembers nothing: the mixing rate is computed afresh for every update."""


@dataclass(slots=True)
class MixedModels:
    """The models of a buffer, added up as they came.

    Attributes:
        total: the LoRA rule's sum of ``a_i (w_i - base_i)``.
        bases: by version.
        shares: by version, the sum of its ``a_i``.
        kept: the models themselves with their ``a_i``, where the LoRA rule weighs whole updates.
    """

    total: Any = None
    bases: dict[int, Adapter] = field(default_factory=dict)
    shares: dict[int, float] = field(default_factory=dict)
    kept: list[tuple[float, Adapter]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FedAsync:
    """``x <- (1 - a_i) x + a_i w_i`` with ``a_i = a sigma(s_i)``: the base plays no part.

    K models that meet in one buffer are mixed at the rate at which mixing them in turn would have
    let go of x, ``R = 1 - prod_i (1 - a_i)``, shared in proportion to their own rates:
    ``x <- (1 - R) x + R sum_i a_i w_i / sum_i a_i``. For K = 1 that is the published rule, and the
    order of arrival inside a buffer does not matter. Each model is added as it arrives and
    forgotten; memory is one sum and a reference to each base version (``w_i - x`` is
    ``(w_i - base_i) + (base_i - x)``, the second once for a version). HetLoRA weighs ``w_i - x``
    as a whole; under it alone models are kept until their flush.
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
        gathered: MixedModels | None,
        entry: BufferedUpdate,
        update: Adapter,
        base: Adapter,
        lora: LoraRule,
    ) -> MixedModels:
        """Add ``a_i (w_i - base_i)`` to the sum, and ``a_i`` to its version's share."""
        gathered = gathered or MixedModels()
        version, rate = entry.base_version, self._rate(entry)
        if not is_separable(lora):
            gathered.kept.append((rate, update))
            return gathered
        gathered.bases.setdefault(version, base)
        gathered.shares[version] = gathered.shares.get(version, 0.0) + rate
        if entry.norm > 0:
            gathered.total = lora.add(gathered.total, rate, update, base, version)
        return gathered

    def apply(
        self, state: FedAsyncState, gathered: MixedModels | None, flush: Flush
    ) -> tuple[FedAsyncState, Step]:
        """Return the state and the server step.

        Raises:
            RuleError: the flush holds no updates.
        """
        require_updates(flush)
        gathered = gathered or MixedModels()
        rates = [self._rate(entry) for entry in flush.updates]
        whole_rate = math.fsum(rates)
        kept = math.prod(1.0 - rate for rate in rates)
        scale = (1.0 - kept) / whole_rate if whole_rate > 0 else 0.0
        weights = tuple(scale * rate for rate in rates)
        work = ServerWork(combining_bytes(flush))
        if gathered.kept:
            terms = [(scale * rate, model, flush.adapter) for rate, model in gathered.kept]
            return state, Step(flush.lora.combine(flush.adapter, terms), weights, work=work)
        total = gathered.total
        for version, base in gathered.bases.items():
            if not _equal(base, flush.adapter):
                share = gathered.shares[version]
                total = flush.lora.add(total, share, base, flush.adapter, flush.version)
        adapter = flush.lora.move(flush.adapter, total, scale)
        return state, Step(adapter, weights, work=work)

    def _rate(self, entry: BufferedUpdate) -> float:
        return self.mixing * discount(
            self.discount, entry.staleness, self.exponent, self.hinge_slope, self.hinge_start
        )


def _equal(first: Adapter, other: Adapter) -> bool:
    """Whether two adapters hold the same numbers: then their difference is nothing, exactly."""
    if first is other:
        return True
    return first.layout == other.layout and all(
        torch.equal(buffer, other.buffers[dtype]) for dtype, buffer in first.buffers.items()
    )

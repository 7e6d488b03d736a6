"""Flushes for the contract: real adapters, stated staleness, a calibration loss with a minimum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, difference, linear_combination, norm
from alignfed.core.ports import (
    AggregationRule,
    BufferedUpdate,
    Calibrator,
    Flush,
    LoraRule,
    Step,
    ahead_of,
)
from alignfed.core.update import Update
from tests.core.adapters import make_adapter, moved

VERSION = 9


@dataclass(frozen=True)
class DistanceCalibrator:
    """Mean squared distance of the products from a target's; features and inputs to match."""

    target: Adapter
    tokens: int = 40

    def loss(self, adapter: Adapter) -> float:
        return float((_effect(adapter) - _effect(self.target)).square().mean())

    def features(self, adapter: Adapter) -> Tensor:
        return torch.tanh(_effect(adapter)).reshape(1, -1)

    def inputs(self, adapter: Adapter) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        found = {}
        for name, factors in adapter.lora.items():
            x = torch.randn(7, factors.a.shape[1], generator=generator)
            found[name] = x + 0.1 * torch.tanh(factors.a.float().sum(0))
        return found


@dataclass(frozen=True)
class Arrival:
    """An accepted upload on its way into a rule."""

    update: Update
    base: Adapter
    norm: float
    uploads: int
    staleness: int = 0

    def entry(self) -> BufferedUpdate:
        """What stays in the buffer."""
        update = self.update
        return BufferedUpdate(
            task_id=update.task_id,
            client_id=update.client_id,
            base_version=update.base_version,
            num_examples=update.num_examples,
            norm=self.norm,
            uploads=self.uploads,
            staleness=self.staleness,
            size_bytes=update.adapter.size_bytes + self.base.size_bytes,
        )


@dataclass(frozen=True)
class Given:
    """A flush to be, with the uploads that lead to it."""

    version: int
    adapter: Adapter
    updates: tuple[Arrival, ...]
    mean_uploads: float
    clients: int
    lora: LoraRule
    calibrator: Calibrator | None = None


def arrived(rule: AggregationRule, given: Given, *, ahead: bool = False) -> tuple[Any, Flush]:
    """Let every upload arrive; return what the rule gathered, and the flush to come.

    With ``ahead`` the rule also does what need not wait for the flush, as in the coordinator.
    """
    entries, gathered = tuple(arrival.entry() for arrival in given.updates), None
    for known, one in zip(entries, given.updates, strict=True):
        gathered = rule.receive(gathered, known, one.update.adapter, one.base, given.lora)
        if ahead:
            work = ahead_of(rule)
            assert work is not None, "this rule has nothing to do ahead of its flush"
            work(gathered, given.adapter, given.lora, given.calibrator)
    return gathered, Flush(
        given.version,
        given.adapter,
        entries,
        given.mean_uploads,
        given.clients,
        given.lora,
        given.calibrator,
    )


def aggregate(rule: AggregationRule, state: Any, given: Given) -> tuple[Any, Step]:
    """Let every upload arrive, then flush."""
    return rule.apply(state, *arrived(rule, given))


def entry(
    position: int,
    update: Adapter,
    base: Adapter,
    *,
    staleness: int = 0,
    uploads: int = 1,
    num_examples: int = 8,
) -> Arrival:
    """Return a buffered update of client ``position``; adapters of other ranks get norm 1."""
    same = update.layout == base.layout
    return Arrival(
        update=Update(position, position, VERSION - staleness, update, num_examples),
        base=base,
        norm=norm(difference(update, base)) if same else 1.0,
        uploads=uploads,
        staleness=staleness,
    )


def flush(
    current: Adapter,
    entries: Sequence[Arrival],
    lora: LoraRule,
    *,
    mean_uploads: float = 1.0,
    calibrator: Calibrator | None = None,
) -> Given:
    """Return a flush at ``VERSION``, of updates as they come through this LoRA rule's wire."""
    if lora.name == "ffa":
        entries = [_ffa(current, one) for one in entries]
    return Given(VERSION, current, tuple(entries), mean_uploads, 40, lora, calibrator)


def stale_flush(
    lora: LoraRule, *, dtype: torch.dtype = torch.float32, calibrated: bool = True
) -> Given:
    """Return five updates of three versions, one version holding three of them."""
    current = make_adapter(1, dtype=dtype)
    bases = {0: current, 2: moved(current, 2), 5: moved(current, 3)}
    entries = [
        entry(i, moved(bases[s], 10 + i), bases[s], staleness=s, uploads=n, num_examples=4 + i)
        for i, (s, n) in enumerate([(0, 3), (2, 1), (2, 4), (2, 2), (5, 1)])
    ]
    # Where half of what every client wants is done; a target elsewhere would refuse every step.
    wanted = [term for e in entries for term in ((0.5, e.update.adapter), (-0.5, e.base))]
    target = linear_combination([(1.0, current), *wanted])
    calibrator = DistanceCalibrator(target) if calibrated else None
    return flush(current, entries, lora, mean_uploads=2.2, calibrator=calibrator)


def _ffa(current: Adapter, one: Arrival) -> Arrival:
    update, base = (_with_a_of(current, a) for a in (one.update.adapter, one.base))
    length = norm(difference(update, base))
    return replace(one, update=replace(one.update, adapter=update), base=base, norm=length)


def _with_a_of(current: Adapter, adapter: Adapter) -> Adapter:
    lora = {
        name: replace(factors, a=current.lora[name].a) for name, factors in adapter.lora.items()
    }
    return Adapter.pack(lora, adapter.dense)


def _effect(adapter: Adapter) -> Tensor:
    parts = [
        (factors.scale * factors.b.float() @ factors.a.float()).reshape(-1)
        for factors in adapter.lora.values()
    ]
    parts += [tensor.float().reshape(-1) for tensor in adapter.dense.values()]
    return torch.cat(parts)

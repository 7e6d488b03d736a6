"""A tiny asynchronous fleet on quadratic losses whose optimum is known in closed form.

Client i minimises ``0.5 |P - T_i|^2`` over its LoRA product P, and ``0.5 h (x - t_i)^2`` over a
dense vector, by a few steps of gradient descent. Targets differ between clients and their offsets
sum to zero, so the best model for all is the mean target. Clients have periods of their own: fast
ones report often, slow ones are stale.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, LoraFactors, difference, norm
from alignfed.core.ports import AggregationRule, LoraRule, Step
from alignfed.core.update import Update
from tests.contract.flushes import Arrival, Given, aggregate

IN_DIM, OUT_DIM, RANK, CLIENTS = 8, 6, 2, 12
CURVATURE = torch.linspace(0.2, 1.0, 10)


@dataclass(frozen=True)
class Problem:
    """Targets of all clients.

    Attributes:
        products: shape ``(clients, out_dim, in_dim)``; their mean has rank ``RANK``.
        points: shape ``(clients, 10)``.
    """

    products: Tensor
    points: Tensor

    def least_with(self, a: Tensor) -> float:
        """Return the least loss of an adapter whose A stays as it is: B by least squares."""
        common = self.products.mean(0)
        kept = common @ torch.linalg.pinv(a) @ a
        return 0.5 * float((common - kept).square().sum())

    def loss(self, adapter: Adapter) -> float:
        """Return the mean loss over all clients less its least value."""
        factors = adapter.lora["q"]
        product = factors.scale * factors.b @ factors.a
        gap = adapter.dense["x"] - self.points.mean(0)
        square = (product - self.products.mean(0)).square().sum()
        return 0.5 * float(square + (CURVATURE * gap * gap).sum())


@dataclass(frozen=True)
class Calibration:
    """A calibration set that sees the problem itself, and ``floor`` that no model takes away."""

    problem: Problem
    floor: float = 0.0
    tokens: int = 10

    def loss(self, adapter: Adapter) -> float:
        return self.problem.loss(adapter) + self.floor

    def inputs(self, adapter: Adapter) -> Mapping[str, Tensor]:
        return {"q": torch.eye(IN_DIM)}

    def features(self, adapter: Adapter) -> Tensor:
        factors = adapter.lora["q"]
        return (factors.scale * factors.b @ factors.a).reshape(1, -1)


def make_problem(*, disagreement: float, seed: int = 0) -> Problem:
    """Return targets around a common one; ``disagreement`` is relative to its length."""
    generator = torch.Generator().manual_seed(seed)

    def around(common: Tensor) -> Tensor:
        offsets = torch.randn(CLIENTS, *common.shape, generator=generator)
        offsets -= offsets.mean(0)
        lengths = offsets.flatten(1).norm(dim=1).mean()
        return common + offsets * (disagreement * common.norm() / lengths)

    left = torch.randn(OUT_DIM, RANK, generator=generator)
    right = torch.randn(RANK, IN_DIM, generator=generator)
    point = torch.randn(10, generator=generator) * 2
    return Problem(around(left @ right), around(point))


def start(seed: int = 1) -> Adapter:
    """Return what PEFT starts from: a random A, a zero B; and a dense vector of zeros."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(RANK, IN_DIM, generator=generator) * 0.5
    factors = LoraFactors(a, torch.zeros(OUT_DIM, RANK), 2.0 * RANK)
    return Adapter.pack({"q": factors}, {"x": torch.zeros(10)})


def train(
    problem: Problem, client: int, adapter: Adapter, steps: int, rate: float, trains_a: bool = True
) -> Adapter:
    """Return the adapter after a client's local gradient descent."""
    factors = adapter.lora["q"]
    a, b, x = factors.a.clone(), factors.b.clone(), adapter.dense["x"].clone()
    for _ in range(steps):
        gap = factors.scale * b @ a - problem.products[client]
        grad_a, grad_b = factors.scale * b.T @ gap, factors.scale * gap @ a.T
        a, b = a - rate * grad_a * trains_a, b - rate * grad_b
        x = x - 10 * rate * CURVATURE * (x - problem.points[client])
    return Adapter.pack({"q": LoraFactors(a, b, factors.alpha)}, {"x": x})


def run(
    rule: AggregationRule,
    lora: LoraRule,
    problem: Problem,
    *,
    buffer_size: int,
    flushes: int,
    steps: int = 4,
    rate: float = 0.02,
    calibrated: bool = False,
    floor: float = 0.0,
    trains_a: bool = True,
    send: Callable[[int, Adapter, Adapter], Adapter] = lambda client, trained, base: trained,
    watch: Callable[[Sequence[Arrival], Step], None] = lambda buffer, step: None,
) -> tuple[list[float], list[float]]:
    """Return the loss after every flush (the start's first), and the mean staleness of each.

    ``send`` returns what a client sends for what it trained from a base; ``watch`` sees each flush.
    """
    adapter = start()
    state = rule.init(adapter)
    losses, staleness = [problem.loss(adapter)], []
    version, uploads, task_id = 0, [0] * CLIENTS, 0
    # Periods from 1 to 4, none a multiple of another; ties leave by task.
    flight = [(1.0 + 3.1 * c / CLIENTS, c, c, 0, adapter) for c in range(CLIENTS)]
    heapq.heapify(flight)
    task_id = CLIENTS
    buffer: list[Arrival] = []
    while version < flushes:
        time, task, client, base_version, base = heapq.heappop(flight)
        trained = send(client, train(problem, client, base, steps, rate, trains_a), base)
        uploads[client] += 1
        update = Update(task, client, base_version, trained, 8)
        buffer.append(
            Arrival(
                update,
                base,
                norm(difference(trained, base)),
                uploads[client],
                version - base_version,
            )
        )
        if len(buffer) == (CLIENTS if rule.synchronous else buffer_size):
            staleness.append(sum(arrival.staleness for arrival in buffer) / len(buffer))
            seen = [count for count in uploads if count]
            state, step = aggregate(
                rule,
                state,
                Given(
                    version,
                    adapter,
                    tuple(buffer),
                    sum(seen) / len(seen),
                    CLIENTS,
                    lora,
                    Calibration(problem, floor) if calibrated else None,
                ),
            )
            watch(buffer, step)
            adapter, version, buffer = step.adapter, version + 1, []
            losses.append(problem.loss(adapter))
            if rule.synchronous:
                for member in range(CLIENTS):
                    again = (time + 1.0 + 3.1 * member / CLIENTS, task_id, member, version, adapter)
                    heapq.heappush(flight, again)
                    task_id += 1
        if not rule.synchronous:
            heapq.heappush(
                flight, (time + 1.0 + 3.1 * client / CLIENTS, task_id, client, version, adapter)
            )
            task_id += 1
    return losses, staleness

"""Examples and adapters that several test files need."""

import torch

from alignfed.core.adapter import Adapter, LoraFactors
from alignfed.training.data import ClientData, FederatedData
from alignfed.training.templates import Example, TemplateSettings

TEMPLATE = TemplateSettings("{question}=", "{answer}")


def sums(start: int, count: int) -> tuple[Example, ...]:
    """Additions, no two alike: ``7+12=`` and ``19``."""
    pairs = [(number % 10, number) for number in range(start, start + count)]
    return tuple(Example(f"{a}+{b}=", str(a + b)) for a, b in pairs)


def texts(start: int, count: int, num_labels: int = 5) -> tuple[Example, ...]:
    """Texts to classify, no two alike, of different lengths."""
    return tuple(
        Example(f"{'abcde'[n % num_labels] * (2 + n % 7)} {n}", "", n % num_labels)
        for n in range(start, start + count)
    )


def federated(make=sums, clients: int = 3, size: int = 10) -> FederatedData:
    """Clients with different examples each, and sets apart from theirs."""
    return FederatedData(
        clients={
            i: ClientData(f"client-{i}", make(100 * i, size), make(100 * i + 50, 4))
            for i in range(clients)
        },
        evaluation=make(5000, 12),
        calibration=make(6000, 6),
    )


def moved(adapter: Adapter, seed: int = 0, size: float = 0.1) -> Adapter:
    """The adapter with noise on every element, so that B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        adapter.layout,
        {
            dtype: buffer + size * torch.randn(buffer.shape, generator=generator).to(dtype)
            for dtype, buffer in adapter.buffers.items()
        },
    )


def reranked(adapter: Adapter, ranks: dict[str, int], seed: int = 0) -> Adapter:
    """An adapter for the same modules with other ranks and alphas, random throughout."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, factors in adapter.lora.items():
        rank = ranks.get(name, factors.rank)
        lora[name] = LoraFactors(
            0.1 * torch.randn(rank, factors.a.shape[1], generator=generator),
            0.1 * torch.randn(factors.b.shape[0], rank, generator=generator),
            1.5 * rank,
        )
    return Adapter.pack(lora, adapter.dense)

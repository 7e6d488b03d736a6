"""Small real adapters for tests: two LoRA layers of unequal sizes and one dense head."""

from __future__ import annotations

import torch

from alignfed.core.adapter import Adapter, LoraFactors


def make_adapter(
    seed: int = 0,
    *,
    rank: int = 2,
    alpha: float = 4.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    dense: bool = True,
) -> Adapter:
    """Return an adapter with normal entries, reproducible from its seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    lora = {
        name: LoraFactors(draw(rank, in_dim), draw(out_dim, rank), alpha)
        for name, in_dim, out_dim in (("layers.0.q_proj", 6, 5), ("layers.1.up_proj", 5, 9))
    }
    return Adapter.pack(lora, {"score.weight": draw(3, 6)} if dense else None)


def moved(adapter: Adapter, seed: int, scale: float = 0.1) -> Adapter:
    """Return ``adapter`` plus a small random step: what a client might send back."""
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        adapter.layout,
        {
            dtype: buffer
            + (scale * torch.randn(buffer.shape, generator=generator)).to(buffer.dtype)
            for dtype, buffer in adapter.buffers.items()
        },
    )


def along(current: Adapter, position: int, length: float) -> Adapter:
    """Return ``current`` moved along one element of its head."""
    head = current.dense["score.weight"].clone()
    head.view(-1)[position] += length
    return Adapter.pack(current.lora, {"score.weight": head})

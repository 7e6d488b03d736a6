"""What passes between server and clients: who is sent which rank, and which factors come back.

Four views of one task's adapter, each a function of the one before, and none of time:

``sent``      what the client starts from: the server's adapter, cut to the client's rank.
``upload``    what travels back: the trained directions of the uploaded factors, and dense tensors.
``complete``  the client's whole adapter again, from its upload and what it was sent.
``compared``  the pair ``(update, base)`` that the rules are given.

A factor that does not travel is either never trained (FFA-LoRA) or stays with its client (FedSA-
LoRA: ``kept`` and ``rejoin``). Uploads name each factor; a factor is never recognised by its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, AdapterLayout, DenseShape, LoraFactors, LoraShape
from alignfed.errors import RuleError

Part: TypeAlias = Literal["both", "a", "b"]
"""Factors: both, the down-projection A alone, or the up-projection B alone."""

Cut: TypeAlias = Callable[[Adapter, int], Adapter]
"""Returns an adapter's share for a client of a rank, with ``alpha / rank`` unchanged."""

_SUFFIX: Mapping[str, str] = {"a": ".lora_A", "b": ".lora_B"}
"""What names a single factor in an upload."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What of an adapter travels, what is trained, what stays.

    Attributes:
        uploaded: factors that clients send.
        trained: factors that clients train.
        keeps: whether a trained factor that is not uploaded stays with its client across tasks.
        cut: how an adapter is made for a lower rank; None where all clients have the server's.
        pads: whether updates of lower rank are filled up with zeros for the rules.
        ranks: rank by client, where it is not the server's.
        whole: whether every trained direction travels, at one rank: nothing is cut, filled up or
            kept back.
    """

    uploaded: Part = "both"
    trained: Part = "both"
    keeps: bool = False
    cut: Cut | None = None
    pads: bool = False
    ranks: Mapping[int, int] = field(default_factory=dict)
    whole: bool = field(init=False)

    def __post_init__(self) -> None:
        """Work out what is asked for with every upload."""
        whole = self.uploaded == "both" and not self.keeps and not self.ranks
        object.__setattr__(self, "whole", whole)

    def with_ranks(self, ranks: Mapping[int, int]) -> Exchange:
        """Return the same exchange with a rank for each client.

        Raises:
            RuleError: a rank below 1, or the LoRA rule has no place for mixed ranks.
        """
        if ranks and self.cut is None:
            raise RuleError("this LoRA rule adds factors of one rank; leave client ranks unset")
        for client_id, rank in ranks.items():
            if rank < 1:
                raise RuleError(
                    f"rank {rank} of client {client_id} must be at least 1", client_id=client_id
                )
        return replace(self, ranks=dict(ranks))

    def sent(self, adapter: Adapter, client_id: int) -> Adapter:
        """Return what a client starts from; the very adapter where nothing is cut."""
        rank = self.ranks.get(client_id)
        if rank is None or self.cut is None:
            return adapter
        if all(shape.rank - shape.frozen <= rank for _, shape in adapter.layout.lora):
            return adapter
        return self.cut(adapter, rank)

    def upload(self, trained: Adapter) -> Adapter:
        """Return what travels of a trained adapter."""
        if self.uploaded == "both":
            return trained_part(trained) if trained.layout.folded else trained
        dense = {
            name + _SUFFIX[self.uploaded]: getattr(factors, self.uploaded)
            for name, factors in trained_part(trained).lora.items()
        }
        return Adapter.pack({}, {**dense, **trained.dense})

    def upload_layout(self, sent: AdapterLayout) -> AdapterLayout:
        """Return the layout that ``upload`` gives an adapter of layout ``sent``."""
        whole = _trained_layout(sent) if sent.folded else sent
        if self.uploaded == "both":
            return whole
        single = [
            (
                name + _SUFFIX[self.uploaded],
                DenseShape(
                    (one.rank, one.in_dim) if self.uploaded == "a" else (one.out_dim, one.rank),
                    one.dtype,
                ),
            )
            for name, one in whole.lora
        ]
        return AdapterLayout((), tuple(sorted([*single, *sent.dense])))

    def transfer_bytes(self, sent: AdapterLayout, dispatch: int) -> tuple[int, int]:
        """Return the bytes of a client's download number ``dispatch``, and of its answer.

        A factor that never changes travels down once (FFA-LoRA's A, with the client's first task);
        one that is the client's own never does (FedSA-LoRA's B).
        """
        if self.whole and not sent.folded:
            return sent.size_bytes, sent.size_bytes
        up_bytes = self.upload_layout(sent).size_bytes
        if self.uploaded == "both" or (dispatch == 0 and not self.keeps):
            return sent.size_bytes, up_bytes
        return up_bytes, up_bytes

    def complete(self, upload: Adapter, sent: Adapter) -> Adapter:
        """Return the client's whole adapter, in the layout of what it was sent.

        Args:
            upload: an adapter of ``upload_layout``.
            sent: what the client started from.
        """
        same = upload.layout is sent.layout or upload.layout == sent.layout
        if self.uploaded == "both" and same:
            return upload
        lora = {}
        for name, old in sent.lora.items():
            count = old.rank - old.frozen
            a, b = old.a[:count], old.b[:, :count]
            if self.uploaded == "both":
                a, b = upload.lora[name].a, upload.lora[name].b
            elif self.uploaded == "a":
                a = upload.dense[name + _SUFFIX["a"]]
            else:
                b = upload.dense[name + _SUFFIX["b"]]
            lora[name] = replace(
                old, a=torch.cat([a, old.a[count:]]), b=torch.cat([b, old.b[:, count:]], dim=1)
            )
        dense = {name: upload.dense[name] for name in sent.dense}
        return Adapter.pack(lora, dense)

    def compared(self, update: Adapter, sent: Adapter, server: Adapter) -> tuple[Adapter, Adapter]:
        """Return the update and the base that aggregation sees.

        Rules of mixed ranks are kept as published: a client's model counts against the server's
        whole model of that version, so that directions it was not sent are pulled towards zero.
        Where the server folds base updates of its own in, it counts against what was sent.

        Args:
            update: the client's whole adapter.
            sent: what it started from.
            server: the server's adapter of that version.
        """
        if sent is server or not self.ranks:
            return update, sent
        if self.pads:
            return padded(update, server), server
        return (update, sent) if server.layout.folded else (update, server)

    def kept(self, trained: Adapter) -> Adapter | None:
        """Return what stays with the client, as named tensors; None: nothing does."""
        if not self.keeps:
            return None
        own: Literal["a", "b"] = "b" if self.uploaded == "a" else "a"
        return Adapter.pack(
            {},
            {name + _SUFFIX[own]: getattr(one, own) for name, one in trained.lora.items()},
        )

    def rejoin(self, sent: Adapter, kept: Adapter | None) -> Adapter:
        """Return what the server sent with what the client kept in its place."""
        if kept is None:
            return sent
        lora = {}
        for name, factors in sent.lora.items():
            if self.uploaded == "a":
                lora[name] = replace(factors, b=kept.dense[name + _SUFFIX["b"]])
            else:
                lora[name] = replace(factors, a=kept.dense[name + _SUFFIX["a"]])
        return Adapter.pack(lora, sent.dense)


WHOLE = Exchange()
"""Everything travels both ways, at one rank."""


def trained_part(adapter: Adapter) -> Adapter:
    """Return an adapter without its frozen directions, ``alpha / rank`` unchanged."""
    if not adapter.layout.folded:
        return adapter
    return Adapter.pack(
        {name: leading(one, one.rank - one.frozen) for name, one in adapter.lora.items()},
        adapter.dense,
    )


def leading(factors: LoraFactors, rank: int) -> LoraFactors:
    """Return the first ``rank`` directions, none of them frozen, ``alpha / rank`` unchanged."""
    alpha = factors.alpha if rank == factors.rank else factors.alpha * rank / factors.rank
    return LoraFactors(factors.a[:rank], factors.b[:, :rank], alpha)


def padded(adapter: Adapter, like: Adapter) -> Adapter:
    """Return an adapter with zero directions appended, in the layout of ``like``."""
    if adapter.layout == like.layout:
        return adapter
    lora = {}
    for name, target in like.lora.items():
        factors = adapter.lora[name]
        a, b = torch.zeros_like(target.a), torch.zeros_like(target.b)
        a[: factors.rank], b[:, : factors.rank] = factors.a, factors.b
        lora[name] = replace(target, a=a, b=b)
    return Adapter.pack(lora, adapter.dense)


def frozen_mask(adapter: Adapter, trained: Part) -> Adapter:
    """Return an adapter of the same layout with ones where nothing may be trained, else zeros."""
    lora = {}
    for name, factors in adapter.lora.items():
        a, b = torch.zeros_like(factors.a), torch.zeros_like(factors.b)
        first = factors.rank - factors.frozen
        _fill(a, whole=trained == "b", rest=a[first:])
        _fill(b, whole=trained == "a", rest=b[:, first:])
        lora[name] = replace(factors, a=a, b=b)
    return Adapter.pack(lora, {name: torch.zeros_like(one) for name, one in adapter.dense.items()})


def _fill(factor: Tensor, *, whole: bool, rest: Tensor) -> None:
    (factor if whole else rest).fill_(1.0)


def _trained_layout(layout: AdapterLayout) -> AdapterLayout:
    lora: list[tuple[str, LoraShape]] = []
    for name, one in layout.lora:
        rank = one.rank - one.frozen
        # The same arithmetic as ``leading``: alphas are compared exactly.
        alpha = one.alpha if rank == one.rank else one.alpha * rank / one.rank
        lora.append((name, replace(one, rank=rank, alpha=alpha, frozen=0)))
    return AdapterLayout(tuple(lora), layout.dense)


__all__ = [
    "WHOLE",
    "Exchange",
    "Part",
    "frozen_mask",
    "leading",
    "padded",
    "trained_part",
]

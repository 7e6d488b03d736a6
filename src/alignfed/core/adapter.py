"""Adapters as values: named LoRA factors and dense tensors in one flat buffer per dtype.

Nothing here changes an argument. The algebra of the product ``(alpha / rank) B A`` lives in
``algebra.py``; this file knows what an adapter is and does factor-wise vector arithmetic on it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from alignfed.errors import AdapterError

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The dtypes an adapter may hold, by the name used in recipes, journals and on the wire."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

PIECE = 1 << 18
"""Elements of a flat buffer that are worked on at a time."""

Slice: TypeAlias = "tuple[str, str, torch.dtype, tuple[int, ...], int]"
"""Where a tensor lies: ``(name, part, dtype, shape, offset)``; part is a, b or dense."""

Term: TypeAlias = "tuple[float, Adapter]"
"""A coefficient and the adapter it scales."""


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One adapted linear layer, ``W = W0 + (alpha / rank) B A`` (Hu et al. 2021, section 4.1).

    Attributes:
        a: down-projection A, shape ``(rank, in_dim)``.
        b: up-projection B, shape ``(out_dim, rank)``.
        alpha: numerator of the scale ``alpha / rank``.
        frozen: how many of the last directions (rows of A, columns of B) belong to the base
            weights: part of the model, never trained or uploaded.
    """

    a: Tensor
    b: Tensor
    alpha: float
    frozen: int = 0

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        """The factor ``alpha / rank`` in front of ``B A``."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class LoraShape:
    """Sizes of one adapted layer, without its numbers."""

    in_dim: int
    out_dim: int
    rank: int
    alpha: float
    dtype: str
    frozen: int = 0


@dataclass(frozen=True, slots=True)
class DenseShape:
    """Shape and dtype of one tensor that is trained whole."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """What an adapter holds and where: names in sorted order, LoRA first, A before B.

    Attributes:
        lora: ``(module name, sizes)`` pairs.
        dense: ``(tensor name, shape)`` pairs.
        slices: where each tensor lies.
        sizes: elements in the flat buffer of each dtype.
        size_bytes: bytes of all tensors together: what one transfer of the adapter carries.
        folded: whether some directions belong to the base weights (``LoraFactors.frozen``).
    """

    lora: tuple[tuple[str, LoraShape], ...]
    dense: tuple[tuple[str, DenseShape], ...]
    # What follows from these is worked out once: it is asked for several times an upload.
    slices: tuple[Slice, ...] = field(init=False, repr=False, compare=False)
    sizes: Mapping[torch.dtype, int] = field(init=False, repr=False, compare=False)
    size_bytes: int = field(init=False, repr=False, compare=False)
    folded: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Find every tensor's place."""
        sizes: dict[torch.dtype, int] = {}
        slices = []
        for name, part, dtype_name, shape in self._tensors():
            dtype = DTYPES[dtype_name]
            offset = sizes.get(dtype, 0)
            sizes[dtype] = offset + math.prod(shape)
            slices.append((name, part, dtype, shape, offset))
        size_bytes = sum(count * dtype.itemsize for dtype, count in sizes.items())
        object.__setattr__(self, "slices", tuple(slices))
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "size_bytes", size_bytes)
        object.__setattr__(self, "folded", any(shape.frozen for _, shape in self.lora))

    def describe_difference(self, other: AdapterLayout) -> str | None:
        """Return the first difference in words, or None when both layouts are equal."""
        if self == other:
            return None
        for kind in ("lora", "dense"):
            mine, theirs = dict(getattr(self, kind)), dict(getattr(other, kind))
            if missing := sorted(set(mine) - set(theirs)):
                return f"{kind} tensor {missing[0]!r} is missing"
            if extra := sorted(set(theirs) - set(mine)):
                return f"{kind} tensor {extra[0]!r} is not expected"
            for name in mine:
                if mine[name] != theirs[name]:
                    return f"{name!r} is {theirs[name]}, expected {mine[name]}"
        return "the order of tensors differs"

    def _tensors(self) -> list[tuple[str, str, str, tuple[int, ...]]]:
        found: list[tuple[str, str, str, tuple[int, ...]]] = []
        for name, lora in self.lora:
            found.append((name, "a", lora.dtype, (lora.rank, lora.in_dim)))
            found.append((name, "b", lora.dtype, (lora.out_dim, lora.rank)))
        found.extend((name, "dense", dense.dtype, dense.shape) for name, dense in self.dense)
        return found


@dataclass(frozen=True, eq=False)
class Adapter:
    """Everything a client trains: LoRA factors of any ranks, and tensors trained whole.

    Attributes:
        layout: names, sizes, ranks and dtypes.
        buffers: one flat contiguous tensor per dtype; every named tensor is a view into it.
    """

    layout: AdapterLayout
    buffers: Mapping[torch.dtype, Tensor]

    @classmethod
    def pack(
        cls, lora: Mapping[str, LoraFactors], dense: Mapping[str, Tensor] | None = None
    ) -> Adapter:
        """Copy named tensors into flat buffers.

        Raises:
            AdapterError: factors that do not fit each other, or a dtype outside ``DTYPES``.
        """
        dense = dense or {}
        layout = _layout(
            tuple((name, _lora_shape(name, lora[name])) for name in sorted(lora)),
            tuple((name, _dense_shape(name, dense[name])) for name in sorted(dense)),
        )
        pieces: dict[torch.dtype, list[Tensor]] = {}
        for name, part, dtype, _, _ in layout.slices:
            tensor = dense[name] if part == "dense" else getattr(lora[name], part)
            pieces.setdefault(dtype, []).append(tensor.detach().reshape(-1))
        return cls(layout, {dtype: torch.cat(parts) for dtype, parts in pieces.items()})

    @cached_property
    def lora(self) -> Mapping[str, LoraFactors]:
        """LoRA factors by module name, as views into the flat buffers."""
        shapes = dict(self.layout.lora)
        parts = {(name, part): view for name, part, view in self._views() if part != "dense"}
        return {
            name: LoraFactors(parts[name, "a"], parts[name, "b"], shape.alpha, shape.frozen)
            for name, shape in shapes.items()
        }

    @cached_property
    def dense(self) -> Mapping[str, Tensor]:
        """Tensors trained whole, by name, as views into the flat buffers."""
        return {name: view for name, part, view in self._views() if part == "dense"}

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors together."""
        return self.layout.size_bytes

    @cached_property
    def checksum(self) -> str:
        """SHA-256 over names, sizes, dtypes and the exact bits, as 64 hexadecimal digits."""
        digest = hashlib.sha256(repr((self.layout.lora, self.layout.dense)).encode())
        for dtype in sorted(self.buffers, key=str):
            digest.update(self.buffers[dtype].cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def is_finite(self) -> bool:
        """Return whether no element is NaN or infinite."""
        # A sum is NaN or infinite if any element is, and reads memory once without a mask.
        return all(
            math.isfinite(buffer.sum(dtype=torch.float32).item())
            or bool(torch.isfinite(buffer).all())
            for buffer in self.buffers.values()
        )

    def to(self, dtype: torch.dtype) -> Adapter:
        """Return the same adapter with every tensor in one dtype."""
        if set(self.buffers) <= {dtype}:
            return self
        return Adapter.pack(
            {
                name: replace(factors, a=factors.a.to(dtype), b=factors.b.to(dtype))
                for name, factors in self.lora.items()
            },
            {name: tensor.to(dtype) for name, tensor in self.dense.items()},
        )

    def _views(self) -> list[tuple[str, str, Tensor]]:
        return [
            (name, part, self.buffers[dtype][offset : offset + math.prod(shape)].view(shape))
            for name, part, dtype, shape, offset in self.layout.slices
        ]


def require_same_layout(first: Adapter, other: Adapter) -> None:
    """Refuse adapters that are not vectors of the same space.

    Raises:
        AdapterError: names, shapes, ranks, alphas or dtypes differ.
    """
    if first.layout is other.layout:
        return
    difference = first.layout.describe_difference(other.layout)
    if difference is not None:
        raise AdapterError(f"adapters do not fit: {difference}", difference=difference)


def linear_combination(terms: Sequence[Term]) -> Adapter:
    """Return ``sum_j coefficient_j * adapter_j``, factor by factor, accumulated in fp32.

    Raises:
        AdapterError: no terms, or layouts that differ.
    """
    if not terms:
        raise AdapterError("a linear combination needs at least one term")
    first = terms[0][1]
    for _, adapter in terms[1:]:
        require_same_layout(first, adapter)
    buffers = {}
    for dtype in first.buffers:
        total = first.buffers[dtype].to(torch.float32) * terms[0][0]
        for coefficient, adapter in terms[1:]:
            total.add_(adapter.buffers[dtype], alpha=coefficient)
        buffers[dtype] = total.to(dtype)
    return Adapter(first.layout, buffers)


def difference(adapter: Adapter, base: Adapter) -> Adapter:
    """Return ``adapter - base``, factor by factor.

    Raises:
        AdapterError: the layouts differ.
    """
    require_same_layout(adapter, base)
    return Adapter(
        adapter.layout,
        {dtype: buffer - base.buffers[dtype] for dtype, buffer in adapter.buffers.items()},
    )


def inner_product(first: Adapter, other: Adapter) -> float:
    """Return the Euclidean inner product over all elements, factor by factor.

    Raises:
        AdapterError: the layouts differ.
    """
    require_same_layout(first, other)
    return sum(
        float(torch.dot(buffer.to(torch.float32), other.buffers[dtype].to(torch.float32)))
        for dtype, buffer in first.buffers.items()
    )


def norm(adapter: Adapter) -> float:
    """Return the Euclidean norm over all elements, factor by factor."""
    return math.sqrt(
        sum(
            float(torch.linalg.vector_norm(buffer, dtype=torch.float32)) ** 2
            for buffer in adapter.buffers.values()
        )
    )


def pieces(buffer: Tensor, size: int = PIECE) -> list[Tensor]:
    """Return a flat buffer as views of ``size`` elements; the last may be shorter."""
    return list(torch.split(buffer, size))


def with_layout(adapter: Adapter, layout: AdapterLayout) -> Adapter:
    """Return an adapter of equal layout with this very one, so that nobody compares again."""
    return adapter if adapter.layout is layout else Adapter(layout, adapter.buffers)


def zeros_like(adapter: Adapter) -> Adapter:
    """Return an adapter of the same layout whose every element is zero."""
    zeros = {dtype: torch.zeros_like(buffer) for dtype, buffer in adapter.buffers.items()}
    return Adapter(adapter.layout, zeros)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of an adapter's dtype as recipes and journals spell it.

    Raises:
        AdapterError: the dtype is not one an adapter may hold.
    """
    try:
        return _DTYPE_NAMES[dtype]
    except KeyError:
        raise AdapterError(
            f"dtype {dtype} is not supported in an adapter; use one of {', '.join(DTYPES)}",
            dtype=str(dtype),
        ) from None


@lru_cache(maxsize=64)
def _layout(
    lora: tuple[tuple[str, LoraShape], ...], dense: tuple[tuple[str, DenseShape], ...]
) -> AdapterLayout:
    """Return a layout; equal ones are one object, compared by a look and measured once."""
    return AdapterLayout(lora, dense)


def _lora_shape(name: str, factors: LoraFactors) -> LoraShape:
    a, b = factors.a, factors.b
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise AdapterError(
            f"LoRA factors of {name!r} do not fit: A is {tuple(a.shape)}, B is {tuple(b.shape)};"
            " expected (rank, in_dim) and (out_dim, rank) with the same rank of at least 1",
            module=name,
        )
    if a.dtype != b.dtype:
        raise AdapterError(f"A of {name!r} is {a.dtype} but B is {b.dtype}", module=name)
    if not (math.isfinite(factors.alpha) and factors.alpha > 0):
        raise AdapterError(f"alpha of {name!r} is {factors.alpha}, must be > 0", module=name)
    rank, frozen = a.shape[0], factors.frozen
    if not 0 <= frozen < rank:
        raise AdapterError(
            f"{frozen} of {rank} directions of {name!r} are frozen; at least one must be trained",
            module=name,
        )
    # A float, so that equal layouts are written alike: 4 and 4.0 would have two checksums.
    return LoraShape(
        a.shape[1], b.shape[0], rank, float(factors.alpha), dtype_name(a.dtype), frozen
    )


def _dense_shape(name: str, tensor: Tensor) -> DenseShape:
    return DenseShape(tuple(tensor.shape), dtype_name(tensor.dtype))

"""K adapters in one flat buffer, one row each. Ranks may differ: missing rows are zeros.

Zeros stay zeros. A row of A that is zero gives a zero in ``A x``, hence no gradient for the
matching column of B; a column of B that is zero passes no gradient on to that row of A. AdamW,
weight decay, clipping and FedProx leave a zero with a zero gradient where it is.

B is held transposed, ``(rank, out_dim)``: every skinny product of the forward and backward pass
then has its long axis in memory order (``stacked_layers.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignfed.core.adapter import DTYPES, Adapter, AdapterLayout
from alignfed.training.transfer import to_cpu


@dataclass(frozen=True, slots=True)
class StackedFactors:
    """One adapted layer of ``k`` adapters.

    Attributes:
        down: A, shape ``(k, rank, in_dim)``.
        up: B transposed, shape ``(k, rank, out_dim)``.
        scale: ``alpha / rank`` of each, shape ``(k, 1, 1)``, or a number where all are equal.
    """

    down: Tensor
    up: Tensor
    scale: Tensor | float


@dataclass(frozen=True, slots=True)
class Leaves:
    """What a forward pass of the first ``count`` adapters is computed from.

    Attributes:
        count: adapters.
        lora: factors by module name.
        dense: tensors trained whole, by name, shape ``(count, ...)``.
        gradients: where the gradient of each of ``tensors`` belongs.
    """

    count: int
    lora: Mapping[str, StackedFactors]
    dense: Mapping[str, Tensor]
    gradients: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every leaf, in the order of ``gradients``."""
        factors = (part for one in self.lora.values() for part in (one.down, one.up))
        return (*factors, *self.dense.values())


class StackedAdapters:
    """K adapters for the same modules, trained together.

    Attributes:
        layout: the widest rank of each module, fp32.
        values: every trainable element, fp32, shape ``(K, P)``.
        gradients: their gradients, shape ``(K, P)``.
    """

    def __init__(self, adapters: Sequence[Adapter], device: torch.device) -> None:
        """Copy adapters, which must fit one base, into rows."""
        self._layouts = tuple(adapter.layout for adapter in adapters)
        self.layout = widest(self._layouts)
        size = sum(self.layout.sizes.values())
        self._alike = all(one.slices == self.layout.slices for one in self._layouts)
        self.gradients = torch.zeros(len(adapters), size, device=device)
        if self._alike:
            self.values = torch.empty_like(self.gradients)
            first: dict[int, int] = {}
            for row, adapter in enumerate(adapters):
                # Most clients of a cohort start from one version: it is sent to the device once.
                source = first.setdefault(id(adapter), row)
                flat = adapter.buffers[torch.float32] if source == row else self.values[source]
                self.values[row].copy_(flat)
            _turn(self.values, self.layout)
        else:
            # Put together here: a device is asked once, not once a factor.
            rows = torch.zeros(len(adapters), size)
            for row, adapter in zip(rows, adapters, strict=True):
                for mine, its in self._pairs(row, adapter):
                    mine.copy_(its)
            self.values = rows.to(device)

    def __len__(self) -> int:
        """Return the number of adapters."""
        return len(self._layouts)

    def read(self) -> list[Adapter]:
        """Return a copy of every adapter, on the CPU, in its own ranks and dtypes.

        What stood in ``gradients`` is overwritten.
        """
        if self._alike:
            turned = self.gradients.copy_(self.values)
            _turn(turned, self.layout, back=True)
            return [
                Adapter(layout, {torch.float32: flat})
                for layout, flat in zip(self._layouts, to_cpu(turned), strict=True)
            ]
        read = []
        for layout, row in zip(self._layouts, self.values.cpu(), strict=True):
            sizes = layout.sizes.items()
            buffers = {dtype: torch.empty(size, dtype=dtype) for dtype, size in sizes}
            read.append(Adapter(layout, buffers))
            for mine, its in self._pairs(row, read[-1]):
                its.copy_(mine)
        return read

    def leaves(self, count: int) -> Leaves:
        """Return fresh leaves of the first ``count`` adapters, which are views of ``values``."""
        lora: dict[str, dict[str, Tensor]] = {}
        dense: dict[str, Tensor] = {}
        gradients: dict[tuple[str, str], Tensor] = {}
        for name, part, shape, start, stop in _slices(self.layout):
            own = self.values[:count, start:stop].view(count, *shape).detach().requires_grad_()
            gradients[name, part] = self.gradients[:count, start:stop].view(count, *shape)
            if part == "dense":
                dense[name] = own
            else:
                lora.setdefault(name, {})[part] = own
        factors = {
            name: StackedFactors(parts["a"], parts["b"], self._scale(name, count))
            for name, parts in lora.items()
        }
        places = [gradients[name, part] for name in factors for part in ("a", "b")]
        places += [gradients[name, "dense"] for name in dense]
        return Leaves(count, factors, dense, tuple(places))

    def _scale(self, name: str, count: int) -> Tensor | float:
        shapes = [dict(layout.lora)[name] for layout in self._layouts[:count]]
        scales = [shape.alpha / shape.rank for shape in shapes]
        if len(set(scales)) == 1:
            return scales[0]
        return torch.tensor(scales, device=self.values.device).view(count, 1, 1)

    def _pairs(self, row: Tensor, adapter: Adapter) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield views of equal shape into a row and into an adapter."""
        for name, part, shape, start, stop in _slices(self.layout):
            mine = row[start:stop].view(shape)
            if part == "dense":
                yield mine, adapter.dense[name]
                continue
            factors = adapter.lora[name]
            yield mine[: factors.rank], factors.a if part == "a" else factors.b.t()


def widest(layouts: Sequence[AdapterLayout]) -> AdapterLayout:
    """Return the layout, in fp32, that has room for each of several that fit the same modules."""
    ranks = {name: shape.rank for name, shape in layouts[0].lora}
    for layout in layouts[1:]:
        for name, shape in layout.lora:
            ranks[name] = max(ranks[name], shape.rank)
    first = layouts[0]
    return AdapterLayout(
        tuple(
            (name, replace(one, rank=ranks[name], dtype="float32", frozen=0))
            for name, one in first.lora
        ),
        tuple((name, replace(one, dtype="float32")) for name, one in first.dense),
    )


def _turn(rows: Tensor, layout: AdapterLayout, *, back: bool = False) -> None:
    """Transpose every B in rows of one layout, in place: as adapters hold it, or ``back`` to it."""
    for _, part, shape, start, stop in _slices(layout):
        if part == "b":
            now, then = (shape, shape[::-1]) if back else (shape[::-1], shape)
            held = rows[:, start:stop].clone().view(-1, *now)
            rows[:, start:stop].view(-1, *then).copy_(held.transpose(1, 2))


def _slices(layout: AdapterLayout) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """Yield ``(name, part, shape, start, stop)`` of each tensor in a row, B transposed."""
    for name, part, dtype, shape, start in layout.slices:
        assert dtype is DTYPES["float32"]
        yield (
            name,
            part,
            (shape[1], shape[0]) if part == "b" else shape,
            start,
            start + math.prod(shape),
        )

"""Antidote: zero the few adapter weights that harmful examples depend on, once.

Two scores of a weight, each right where the other fails (docs/log.md).

**Activations.** After Huang et al. 2024, "Antidote: Post-fine-tuning Safety Alignment for Large
Language Models against Harmful Fine-tuning" (arXiv 2408.09600): the score is that of Wanda (Sun et
al. 2023, arXiv 2306.11695), ``|W_ij|`` times the root mean square of its input ``X_j`` on harmful
examples, and the highest of each output row are set to zero. Here the layers are an adapter's
factors: ``x`` enters ``A``, ``A x`` enters ``B``. Where useful examples are given, two departures
keep what the model can do:

- contrast: an input counts by what it carries on harmful examples beyond what it carries on useful
  ones, ``sqrt(max(0, E_harmful X_j^2 - E_useful X_j^2))``;
- protection: weights that score highest on useful examples are left alone, after Wei et al. 2024
  (arXiv 2402.05162, Section 3); the share to zero is then taken of the others.

**Gradients.** To first order, setting ``W_ij`` to zero raises a loss by ``-W_ij dL/dW_ij`` (SNIP,
Lee et al. 2019, arXiv 1810.02340, with its sign kept). The weights whose absence raises the harmful
loss most, less what it does to the useful loss either way, are set to zero, over all modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignfed.core.adapter import Adapter, require_same_layout
from alignfed.errors import AdapterError


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned adapter, of the same layout, and how many of its LoRA weights were set to zero."""

    adapter: Adapter
    zeroed: int


def prune_by_activations(
    adapter: Adapter,
    harmful: Mapping[str, Tensor],
    useful: Mapping[str, Tensor] | None = None,
    *,
    fraction: float,
    protected: float = 0.0,
) -> Pruned:
    """Return the adapter without the weights of each row that harmful inputs excite most.

    Args:
        adapter: not changed; tensors trained whole stay as they are.
        harmful: inputs of each adapted module on harmful examples, shape ``(positions, in_dim)``.
        useful: the same on examples that must go on working; None is Antidote as published.
        fraction: share of each row of ``A`` and ``B`` to set to zero, at least one weight a row.
        protected: share of each row, the highest scores on useful inputs, that is left alone.

    Raises:
        AdapterError: a share outside its range, or inputs that do not fit the adapter.
    """
    _require_share(fraction)
    if not 0.0 <= protected < 1.0:
        raise AdapterError(f"protected is {protected}, must be at least 0 and below 1")
    lora, zeroed = {}, 0
    for name, factors in adapter.lora.items():
        a, b = factors.a, factors.b
        bad = _inputs(harmful, name, a)
        good = None if useful is None else _inputs(useful, name, a)
        first = _chosen(a, bad, good, fraction, protected)
        # What enters B is taken before A is pruned: both are scored on one and the same model.
        down = a.float().T
        second = _chosen(b, bad @ down, None if good is None else good @ down, fraction, protected)
        lora[name] = replace(factors, a=a.masked_fill(first, 0.0), b=b.masked_fill(second, 0.0))
        zeroed += int(first.sum()) + int(second.sum())
    return Pruned(Adapter.pack(lora, dict(adapter.dense)), zeroed)


def prune_by_gradients(
    adapter: Adapter, harmful: Adapter, useful: Adapter | None = None, *, fraction: float
) -> Pruned:
    """Return the adapter without the weights whose absence raises the harmful loss most.

    Args:
        adapter: not changed; tensors trained whole stay as they are.
        harmful: gradient of the mean loss on harmful examples, in the adapter's layout.
        useful: gradient of the mean loss on useful examples; None spares nothing.
        fraction: share of all LoRA weights to set to zero, at least one.

    Raises:
        AdapterError: a share outside its range, or layouts that differ.
    """
    _require_share(fraction)
    for gradient in (harmful, useful):
        if gradient is not None:
            require_same_layout(adapter, gradient)
    found = {
        (name, part): _rise(getattr(factors, part), harmful, useful, name, part)
        for name, factors in adapter.lora.items()
        for part in ("a", "b")
    }
    every = torch.cat([one.flatten() for one in found.values()])
    count = max(1, round(fraction * every.numel()))
    least = every.topk(count).values[-1].clamp(min=torch.finfo(torch.float32).tiny)
    zeroed = int((every >= least).sum())
    lora = {
        name: replace(
            factors,
            a=factors.a.masked_fill(found[name, "a"] >= least, 0.0),
            b=factors.b.masked_fill(found[name, "b"] >= least, 0.0),
        )
        for name, factors in adapter.lora.items()
    }
    return Pruned(Adapter.pack(lora, dict(adapter.dense)), zeroed)


def _rise(weight: Tensor, harmful: Adapter, useful: Adapter | None, name: str, part: str) -> Tensor:
    """Return how much more the harmful loss rises than the useful one moves, to first order."""
    rise: Tensor = -weight.float() * getattr(harmful.lora[name], part).float()
    if useful is not None:
        rise -= (weight.float() * getattr(useful.lora[name], part).float()).abs()
    return rise


def _require_share(fraction: float) -> None:
    if not 0.0 < fraction < 1.0:
        raise AdapterError(f"fraction is {fraction}, must be above 0 and below 1")


def scores(weight: Tensor, power: Tensor) -> Tensor:
    """Return ``|W_ij| sqrt(power_j)``, shape as ``weight`` ``(out, in)``; power is ``(in,)``."""
    return weight.float().abs() * power.sqrt()


def _chosen(
    weight: Tensor, harmful: Tensor, useful: Tensor | None, fraction: float, protected: float
) -> Tensor:
    power = harmful.square().mean(dim=0)
    if useful is None:
        return _highest(scores(weight, power), fraction)
    needed_power = useful.square().mean(dim=0)
    needed = torch.zeros_like(weight, dtype=torch.bool)
    if protected > 0:
        needed = _highest(scores(weight, needed_power), protected)
    found = scores(weight, (power - needed_power).clamp(min=0.0))
    return _highest(found.masked_fill(needed, -1.0), fraction) & ~needed


def _highest(found: Tensor, share: float) -> Tensor:
    """Return a mask of the highest scores of each row, at least one a row."""
    places = found.topk(max(1, round(share * found.shape[1])), dim=1).indices
    return torch.zeros_like(found, dtype=torch.bool).scatter_(1, places, True)


def _inputs(inputs: Mapping[str, Tensor], name: str, a: Tensor) -> Tensor:
    found = inputs.get(name)
    if found is None or found.ndim != 2 or found.shape[1] != a.shape[1]:
        shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
        raise AdapterError(
            f"inputs of {name!r} are {shape}, expected (positions, {a.shape[1]})", module=name
        )
    return found.float()

"""A base's layers computing with K adapters at once: rows of the batch belong to clients in turn.

While ``StackedForward`` is entered, PEFT's LoRA layers and the modules trained whole have another
forward; afterwards they have their own again. Each splits what it is given into K equal parts
along its leading axes, so it is right only where a client's rows lie together in equal numbers. A
model that reorders tokens (a mixture of experts) breaks that; ``stacked_pass.find_obstacle``
compares numbers before anyone relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, vmap
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from alignfed.errors import ModelError
from alignfed.training.models import BaseModel
from alignfed.training.stacked import Leaves, StackedFactors


class StackedForward:
    """Replaces the forward of every trained layer of a base, for as long as it is entered."""

    def __init__(self, base: BaseModel) -> None:
        """Prepare a replacement for each layer; nothing is replaced yet."""
        self._leaves: Leaves | None = None
        self._replacements: list[tuple[nn.Module, Callable[..., Tensor]]] = [
            (layer, self._lora_forward(name, layer)) for name, layer in base.lora_layers.items()
        ]
        owned: dict[nn.Module, dict[str, str]] = {}
        for name, (owner, attribute) in base.dense_owners.items():
            owned.setdefault(owner, {})[attribute] = name
        self._replacements += [
            (owner, self._dense_forward(owner, names)) for owner, names in owned.items()
        ]

    def use(self, leaves: Leaves) -> None:
        """Compute with these adapters from now on."""
        self._leaves = leaves

    def __enter__(self) -> StackedForward:
        """Replace."""
        self._kept = [vars(module).get("forward") for module, _ in self._replacements]
        for module, replacement in self._replacements:
            vars(module)["forward"] = replacement
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore."""
        for (module, _), kept in zip(self._replacements, self._kept, strict=True):
            if kept is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = kept
        self._leaves = None

    def _lora_forward(self, name: str, layer: Any) -> Callable[..., Tensor]:
        base_layer = layer.get_base_layer()
        plain = type(base_layer) in (nn.Linear, Conv1D)

        def forward(inputs: Tensor, *args: Any, **options: Any) -> Tensor:
            if layer.disable_adapters:
                output: Tensor = base_layer(inputs, *args, **options)
                return output
            assert self._leaves is not None
            factors = self._leaves.lora[name]
            if not plain:
                return _added(base_layer(inputs, *args, **options), inputs, factors)
            down, up, weight, bias = factors.down, factors.up, base_layer.weight, base_layer.bias
            if torch.is_autocast_enabled(inputs.device.type):
                # A function of our own is not cast by autocast, so this does what it would.
                dtype = torch.get_autocast_dtype(inputs.device.type)
                inputs, down, up = inputs.to(dtype), down.to(dtype), up.to(dtype)
                weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            if type(base_layer) is Conv1D:
                weight = weight.t()
            _require_whole(inputs, factors.down.shape[0])
            result: Tensor = _LoraLinear.apply(inputs, weight, bias, down, up, factors.scale)
            return result

        return forward

    def _dense_forward(self, module: nn.Module, names: Mapping[str, str]) -> Callable[..., Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            assert self._leaves is not None
            own = {attribute: self._leaves.dense[name] for attribute, name in names.items()}
            parts = _split(inputs, self._leaves.count)
            if type(module) is nn.Linear:
                # Not baddbmm for a bias: it would round once where the layer's own does, but
                # autocast rounds after the product.
                output = torch.bmm(parts, own["weight"].transpose(1, 2))
                if "bias" in own:
                    output = output + own["bias"].to(output.dtype).unsqueeze(1)
                return output.view(*inputs.shape[:-1], output.shape[-1])
            if type(module) is nn.Embedding:
                rows = torch.arange(len(parts), device=inputs.device).unsqueeze(1)
                ids = inputs.reshape(len(parts), -1)
                return own["weight"][rows, ids].view(*inputs.shape, -1)

            # functional_call must find the module's own forward, not this one.
            def alone(parameters: dict[str, Tensor], part: Tensor) -> Tensor:
                output: Tensor = _own_forward(module, parameters, part)
                return output

            return vmap(alone)(own, parts).view(inputs.shape)

        return forward


class _LoraLinear(torch.autograd.Function):
    """``x W^T + b + scale (x A_k^T) B_k^T`` for each client ``k``; nothing for frozen weights.

    ``A x`` is kept as ``(k, rank, positions)``: a product whose short side comes first is several
    times faster on a CPU than its transpose.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: Tensor | float,
    ) -> Tensor:
        clients = down.shape[0]
        inputs = inputs.contiguous()
        parts = inputs.view(clients, -1, inputs.shape[-1])
        output = functional.linear(inputs, weight, bias)
        low = torch.bmm(down, parts.transpose(1, 2)).mul_(scale)
        output.view(clients, -1, output.shape[-1]).baddbmm_(low.transpose(1, 2), up)
        ctx.save_for_backward(inputs, weight, low, down, up)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, low, down, up = ctx.saved_tensors
        clients = down.shape[0]
        parts = inputs.view(clients, -1, inputs.shape[-1])
        gradient = gradient.contiguous()
        gradients = gradient.view(clients, -1, gradient.shape[-1])
        low_gradient = torch.bmm(up, gradients.transpose(1, 2)).mul_(ctx.scale)
        to_inputs = None
        if ctx.needs_input_grad[0]:
            to_inputs = gradient @ weight
            to_inputs.view(parts.shape).baddbmm_(low_gradient.transpose(1, 2), down)
        return (
            to_inputs,
            None,
            None,
            torch.bmm(low_gradient, parts),
            torch.bmm(low, gradients),
            None,
        )


def _added(output: Tensor, inputs: Tensor, factors: StackedFactors) -> Tensor:
    """Return the output of a base layer of any kind (a quantised one) with the adapters added."""
    clients = factors.down.shape[0]
    _require_whole(inputs, clients)
    parts = inputs.reshape(clients, -1, inputs.shape[-1])
    low = torch.bmm(parts.to(factors.down.dtype), factors.down.transpose(1, 2)) * factors.scale
    added = torch.bmm(low, factors.up).view(output.shape)
    return output + added.to(output.dtype)


def _own_forward(module: nn.Module, parameters: dict[str, Tensor], part: Tensor) -> Tensor:
    replaced = vars(module).pop("forward")
    try:
        output: Tensor = functional_call(module, parameters, (part,))
    finally:
        module.__dict__["forward"] = replaced
    return output


def _split(inputs: Tensor, clients: int) -> Tensor:
    _require_whole(inputs, clients)
    if inputs.is_floating_point():
        return inputs.reshape(clients, -1, inputs.shape[-1])
    return inputs.reshape(clients, -1)


def _require_whole(inputs: Tensor, clients: int) -> None:
    positions = inputs.shape[:-1].numel() if inputs.is_floating_point() else inputs.numel()
    if positions % clients:
        raise NotStackable(
            f"a trained layer is given {positions} positions, which {clients} clients cannot share"
            " evenly; this model is trained one client at a time",
            positions=positions,
            clients=clients,
        )


class NotStackable(ModelError):
    """A model's layers see positions in an order or number that cannot be told apart by client."""


__all__ = ["NotStackable", "StackedForward"]

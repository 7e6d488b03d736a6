"""The base model: frozen, loaded once, with one PEFT LoRA adapter to install and read.

Only the adapter's tensors are ever written. They are views into one flat fp32 buffer, so that
installing, reading and the optimiser's arithmetic each are one operation; their gradients are
views into another. The base runs without dropout of its own (``LoraSettings.dropout`` acts on the
adapters' inputs), so what a client computes depends on its task alone.

Padding: the filler is the configuration's pad token, else the tokenizer's, else the
end-of-sequence token. It is masked in attention and in the loss, so it never changes a number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from alignfed.core.adapter import Adapter, AdapterLayout, LoraFactors
from alignfed.errors import ModelError
from alignfed.training.architecture import (
    Architecture,
    forward_flops_per_token,
    training_flops_per_token,
)
from alignfed.training.export import write_peft_folder
from alignfed.training.settings import ModelSettings
from alignfed.training.transfer import to_cpu

ADAPTER_NAME = "default"
"""PEFT's name of the one adapter; it is left out of every name of ours."""


class HeadTap:
    """Stands before the output head: narrows what reaches it and remembers what did.

    A language model's logits cost ``positions x vocabulary``; only the positions whose logits
    somebody asks for are let through.
    """

    def __init__(self) -> None:
        """Let everything through."""
        self.select: Callable[[Tensor], Tensor] | None = None
        self.features: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Act as a forward pre-hook."""
        hidden = inputs[0] if self.select is None else self.select(inputs[0])
        self.features = hidden
        return (hidden, *inputs[1:])


class BaseModel:
    """A frozen base with one adapter in it. It changes: whoever computes installs first.

    Attributes:
        settings: which base it is.
        dropout: probability of dropping an adapter's input while training.
        peft_model: the PEFT model.
        tokenizer: the base's tokenizer.
        architecture: its sizes.
        device: where it computes.
        pad_id: filler token.
        bos_id: token that opens every sequence, None where the tokenizer adds none.
        eos_id: token appended to every response, None for a classifier without one.
        stop_ids: tokens that end a generated text.
        lora_layers: PEFT's layers by adapter name.
        dense_owners: the module and attribute of each tensor trained whole, by its name.
        values: every trainable element, fp32, in the order of ``layout``.
        gradients: their gradients.
        layout: names and sizes of what is installed, in fp32.
    """

    def __init__(
        self,
        settings: ModelSettings,
        dropout: float,
        peft_model: PeftModel,
        tokenizer: Any,
        architecture: Architecture,
        head: nn.Module,
        *,
        pad_id: int,
        bos_id: int | None,
        eos_id: int | None,
        stop_ids: frozenset[int],
    ) -> None:
        """Take over a loaded PEFT model; ``load_base`` makes one."""
        self.settings = settings
        self.dropout = dropout
        self.peft_model = peft_model
        self.tokenizer = tokenizer
        self.architecture = architecture
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id
        self.stop_ids = stop_ids
        self.device = next(peft_model.parameters()).device
        self.lora_layers: dict[str, LoraLayer] = {
            name: module
            for name, module in peft_model.named_modules()
            if isinstance(module, LoraLayer)
        }
        self.dense_owners: dict[str, tuple[nn.Module, str]] = dict(_dense_tensors(peft_model))
        self.head_name = next(name for name, one in peft_model.named_modules() if one is head)
        self.tap = HeadTap()
        head.register_forward_pre_hook(self.tap)
        if settings.dtype == "bfloat16":
            for layer in self.lora_layers.values():
                # Autocast does the casting; PEFT's own would copy every input to fp32 first.
                layer.cast_input_dtype_enabled = False
        first = Adapter.pack(*self._current_tensors())
        self._initial = first.to(torch.float32)
        self._bind(self._initial.layout)
        self.install(self._initial)
        peft_model.eval()

    @property
    def is_classifier(self) -> bool:
        """Whether the base is a sequence classifier."""
        return self.settings.task == "sequence_classification"

    @property
    def tokens_per_batch(self) -> int:
        """Tokens that run together fastest without gradients, where a caller names no number."""
        # Measured at 1M parameters on a CPU: wider batches fall out of its cache. A GPU needs
        # thousands of tokens to be busy at all.
        return 1024 if self.device.type == "cpu" else 16384

    @property
    def num_parameters(self) -> int:
        """Parameters of the base."""
        return self.architecture.num_parameters

    @property
    def adapter_parameters(self) -> int:
        """Elements of the adapter that is installed."""
        return self.values.numel()

    def initial_adapter(self) -> Adapter:
        """Return the adapter every run starts from: PEFT's initial one, or the warm start."""
        return self._initial

    def install(self, adapter: Adapter) -> None:
        """Make the base compute with an adapter, of any rank and dtype.

        Raises:
            ModelError: modules or dimensions that this base does not have.
        """
        plain = adapter.to(torch.float32)
        if plain.layout != self.layout:
            self.require_fit(plain.layout)
            self._bind(plain.layout)
        with torch.no_grad():
            self.values.copy_(plain.buffers[torch.float32])

    def read(self, like: AdapterLayout | None = None) -> Adapter:
        """Return a copy of what is installed, on the CPU, in fp32 or in the dtypes of ``like``."""
        (copied,) = to_cpu(self.values.detach().unsqueeze(0))
        plain = Adapter(self.layout, {torch.float32: copied})
        return plain if like is None or like == self.layout else _with_dtypes(plain, like)

    def export(self, adapter: Adapter, folder: Path, base_model_name: str) -> None:
        """Install an adapter and write it as a standard PEFT folder.

        Plain ``PeftModel.from_pretrained`` loads it, on the base that ``base_model_name`` names.

        Raises:
            ModelError: the adapter does not fit, or the folder cannot be written.
        """
        self.install(adapter)
        shapes = dict(self.layout.lora)
        write_peft_folder(
            self.peft_model,
            folder,
            base_model_name,
            ranks={name: shape.rank for name, shape in shapes.items()},
            alphas={name: shape.alpha for name, shape in shapes.items()},
        )

    def forward_flops_per_token(self, adapter: Adapter | None) -> float:
        """Return the FLOPs of one token's forward pass (None: the base alone)."""
        return forward_flops_per_token(self.architecture, adapter)

    def training_flops_per_token(self, adapter: Adapter) -> float:
        """Return the FLOPs of one token's forward and backward pass."""
        return training_flops_per_token(
            self.architecture,
            adapter,
            gradient_checkpointing=self.settings.gradient_checkpointing,
        )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context every forward pass runs in: bf16 autocast for a bf16 base."""
        if self.settings.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Switch dropout and checkpointing on; both are off outside."""
        if self.dropout == 0 and not self.settings.gradient_checkpointing:
            yield
            return
        self.peft_model.train()
        try:
            yield
        finally:
            self.peft_model.eval()

    def _bind(self, layout: AdapterLayout) -> None:
        """Lay every trainable tensor into fresh flat buffers."""
        total = sum(layout.sizes.values())
        self.layout = layout
        self.values = torch.zeros(total, device=self.device)
        self.gradients = torch.zeros(total, device=self.device)
        self.values.grad = self.gradients
        values = Adapter(layout, {torch.float32: self.values})
        gradients = Adapter(layout, {torch.float32: self.gradients})
        for name, factors in values.lora.items():
            layer = self.lora_layers[name]
            layer.r[ADAPTER_NAME] = factors.rank
            layer.lora_alpha[ADAPTER_NAME] = factors.alpha
            layer.scaling[ADAPTER_NAME] = factors.scale
            down, up = layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]
            down.out_features = up.in_features = factors.rank
            down.weight = _parameter(factors.a, gradients.lora[name].a)
            up.weight = _parameter(factors.b, gradients.lora[name].b)
        for name, tensor in values.dense.items():
            owner, attribute = self.dense_owners[name]
            setattr(owner, attribute, _parameter(tensor, gradients.dense[name]))

    def require_fit(self, layout: AdapterLayout) -> None:
        """Refuse a layout that this base cannot compute with; ranks and alphas are free.

        Raises:
            ModelError: modules or dimensions that this base does not have.
        """

        def rankless(one: AdapterLayout) -> AdapterLayout:
            free = tuple(
                (name, replace(shape, rank=1, alpha=1.0, frozen=0)) for name, shape in one.lora
            )
            return AdapterLayout(free, one.dense)

        problem = rankless(self.layout).describe_difference(rankless(layout))
        if problem is not None:
            raise ModelError(
                f"the adapter does not fit base model {self.settings.path}: {problem}",
                path=self.settings.path,
                difference=problem,
            )

    def _current_tensors(self) -> tuple[Mapping[str, LoraFactors], Mapping[str, Tensor]]:
        lora = {
            name: LoraFactors(
                layer.lora_A[ADAPTER_NAME].weight.detach().float().cpu(),
                layer.lora_B[ADAPTER_NAME].weight.detach().float().cpu(),
                float(layer.lora_alpha[ADAPTER_NAME]),
            )
            for name, layer in self.lora_layers.items()
        }
        dense = {
            name: getattr(owner, attribute).detach().float().cpu()
            for name, (owner, attribute) in self.dense_owners.items()
        }
        return lora, dense


def _dense_tensors(model: PeftModel) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Yield PEFT's saved name of each tensor trained whole, and where it lives."""
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            copy = wrapper.modules_to_save[ADAPTER_NAME]
            for inner, module in copy.named_modules():
                for attribute, _ in module.named_parameters(recurse=False):
                    yield (
                        ".".join(part for part in (name, inner, attribute) if part),
                        (
                            module,
                            attribute,
                        ),
                    )


def _parameter(values: Tensor, gradients: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values)
    parameter.grad = gradients
    return parameter


def _with_dtypes(adapter: Adapter, layout: AdapterLayout) -> Adapter:
    lora_dtypes = {name: shape.dtype for name, shape in layout.lora}
    dense_dtypes = {name: shape.dtype for name, shape in layout.dense}
    return Adapter.pack(
        {
            name: replace(
                factors,
                a=factors.a.to(getattr(torch, lora_dtypes[name])),
                b=factors.b.to(getattr(torch, lora_dtypes[name])),
            )
            for name, factors in adapter.lora.items()
        },
        {
            name: tensor.to(getattr(torch, dense_dtypes[name]))
            for name, tensor in adapter.dense.items()
        },
    )

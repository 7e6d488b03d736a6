"""What a task costs a device and a flush costs the server, from sizes alone.

Nothing here uses a stopwatch: the same recipe costs the same on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from alignfed.core.value import value
from alignfed.errors import FleetError
from alignfed.simulation.devices import DeviceTable

_GIB = 1024**3


@value(frozen=True, slots=True)
class TaskCost:
    """What one task moves and computes.

    Attributes:
        tokens: tokens (padding included) through the model in all local steps.
        flops_per_token: forward and backward FLOPs of one token.
        download_bytes: adapter bytes from the server.
        upload_bytes: adapter bytes to the server.
    """

    tokens: int
    flops_per_token: float
    download_bytes: int
    upload_bytes: int

    def __post_init__(self) -> None:
        """Refuse work that would end before it begins, or never."""
        inf = math.inf
        if (
            0 <= self.tokens < inf
            and 0 <= self.flops_per_token < inf
            and 0 <= self.download_bytes < inf
            and 0 <= self.upload_bytes < inf
        ):
            return
        for name in ("tokens", "flops_per_token", "download_bytes", "upload_bytes"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise FleetError(
                    f"a task has {name}={value}, must be a finite number, at least 0",
                    field=name,
                    value=value,
                )


task_cost = lru_cache(maxsize=4096)(TaskCost)
"""Return a ``TaskCost``; those of equal sizes are one object, checked once."""


@dataclass(frozen=True, slots=True)
class ServerProfile:
    """The server's own speed.

    Attributes:
        memory_bytes_per_s: memory bandwidth; aggregation is limited by it.
        flops_per_s: achieved FLOP/s on calibration forward passes.
    """

    memory_bytes_per_s: float = 20e9
    flops_per_s: float = 1e12

    def __post_init__(self) -> None:
        """Refuse speeds no server has."""
        for name in ("memory_bytes_per_s", "flops_per_s"):
            if not getattr(self, name) > 0:
                raise FleetError(f"server {name}={getattr(self, name)}, must be above 0")

    def server_time_s(self, bytes_moved: float, flops: float) -> float:
        """Return the modelled time of a flush."""
        return bytes_moved / self.memory_bytes_per_s + flops / self.flops_per_s


@dataclass(frozen=True, slots=True)
class TrainingShape:
    """Sizes that decide how much memory local training takes.

    Attributes:
        weight_bytes: the frozen base as loaded (fp32, bf16 or 4-bit).
        adapter_parameters: elements that are trained.
        batch_size: sequences a step.
        sequence_length: tokens a sequence.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the feed-forward block.
        num_layers: transformer layers.
        num_heads: attention heads.
        vocab_size: entries of the output vocabulary (classes, for a classifier).
        activation_bytes: bytes of one activation element (4 in fp32, 2 in bf16).
        gradient_checkpointing: whether only layer inputs are kept.
    """

    weight_bytes: int
    adapter_parameters: int
    batch_size: int
    sequence_length: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    activation_bytes: int = 4
    gradient_checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Memory of local training by what uses it, in bytes."""

    weights_bytes: int
    adapter_bytes: int
    activation_bytes: int
    logits_bytes: int

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return self.weights_bytes + self.adapter_bytes + self.activation_bytes + self.logits_bytes

    def __str__(self) -> str:
        """Return the parts in GiB, for people."""
        parts = (
            ("weights", self.weights_bytes),
            ("adapter, gradients and AdamW", self.adapter_bytes),
            ("activations", self.activation_bytes),
            ("logits", self.logits_bytes),
        )
        return ", ".join(f"{name} {size / _GIB:.3g} GiB" for name, size in parts)


def training_memory(shape: TrainingShape) -> MemoryNeed:
    """Return the memory that local LoRA fine-tuning takes.

    Weights stay as loaded. Each trained element holds its value, gradient and two AdamW moments
    in fp32 (16 bytes; Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1). A layer keeps
    about ``10 d + 4 f`` activation elements a token (norms, query, key, value, attention output,
    residuals; gate, up, product and activation of width f), after the count of Korthikanti et al.
    2022 (arXiv 2205.05198, section 4.1), without attention scores, which fused attention does not
    keep. With checkpointing each layer keeps its input and one layer is held while recomputed.
    Logits are held in fp32 with their gradient.
    """
    tokens = shape.batch_size * shape.sequence_length
    per_layer = (10 * shape.hidden_size + 4 * shape.intermediate_size) * shape.activation_bytes
    if shape.gradient_checkpointing:
        kept = shape.num_layers * shape.hidden_size * shape.activation_bytes + per_layer
    else:
        kept = shape.num_layers * per_layer
    return MemoryNeed(
        weights_bytes=shape.weight_bytes,
        adapter_bytes=16 * shape.adapter_parameters,
        activation_bytes=tokens * kept,
        logits_bytes=tokens * shape.vocab_size * 4 * 2,
    )


def refuse_too_small(devices: DeviceTable, need: MemoryNeed) -> None:
    """Refuse a fleet in which a device cannot hold the model at its batch and sequence length.

    Raises:
        FleetError: with the device, what is needed, what it has, and the remedies.
    """
    short = devices.too_small(need.total_bytes)
    if not short:
        return
    worst = devices.smallest_memory()
    raise FleetError(
        f"{len(short)} of {len(devices)} devices cannot hold the training: device"
        f" {worst.device_id} ({worst.tier}) has {worst.memory_bytes / _GIB:.3g} GiB,"
        f" {need.total_bytes / _GIB:.3g} GiB are needed ({need}); lower training.batch_size,"
        " data.max_length or lora.rank, turn on model.gradient_checkpointing, use a smaller or"
        " quantised model, or a fleet of larger devices",
        device_id=worst.device_id,
        needed_bytes=need.total_bytes,
        available_bytes=worst.memory_bytes,
        need=need,
        too_small=tuple(short),
    )

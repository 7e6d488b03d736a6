"""Bytes, FLOPs and seconds of a recipe on every kind of device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_high

from alignfed.builtin import MODEL_PATH
from alignfed.config import Recipe
from alignfed.config.section import BUILTIN
from alignfed.core.adapter import Adapter, AdapterLayout, DenseShape, LoraShape
from alignfed.errors import RecipeError
from alignfed.planning.blueprint import (
    Blueprint,
    blueprint_of_folder,
    blueprint_of_sizes,
    tensor_shapes,
)
from alignfed.simulation.cost import MemoryNeed, TrainingShape, training_memory
from alignfed.simulation.presets import KINDS, PRESETS
from alignfed.training.architecture import Architecture, training_flops_per_token
from alignfed.training.naming import listed, nearest_name

_NF4_BITS = 4 + 0.127
"""Bits of a weight in NF4 with doubly quantised constants (Dettmers et al. 2023, section 3)."""


@dataclass(frozen=True, slots=True)
class TierPlan:
    """A recipe on one kind of device.

    Attributes:
        tier: the kind.
        share: its share of the recipe's fleet, 0 where it is no part of it.
        memory_bytes: what training may use on it.
        fits: whether that is enough.
        step_s: seconds of one local step of full length.
        steps: local steps of a task, by the kind's speed where the recipe asks for that; None where
            epochs decide.
        transfer_s: seconds of the adapter's way down and up.
        source: where the kind's figures come from.
    """

    tier: str
    share: float
    memory_bytes: float
    fits: bool
    step_s: float
    steps: int | None
    transfer_s: float
    source: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe costs.

    Attributes:
        model: the base model's path.
        base_parameters: elements of the frozen base.
        adapter_parameters: elements that are trained.
        adapter_bytes: bytes of one transfer, in fp32.
        memory: memory of local training, by what uses it.
        flops_per_token: forward and backward.
        tokens_per_step: batch size times longest sequence.
        tiers: every kind of device.
    """

    model: str
    base_parameters: int
    adapter_parameters: int
    adapter_bytes: int
    memory: MemoryNeed
    flops_per_token: float
    tokens_per_step: int
    tiers: tuple[TierPlan, ...]


def make_plan(recipe: Recipe) -> Plan:
    """Count what a recipe costs, at its longest sequences.

    Raises:
        RecipeError: the model's sizes are not at hand, or a LoRA target names no layer.
        ModelError: the model's files are damaged or do not state their sizes.
    """
    found = _blueprint(recipe)
    adapter = Adapter(_layout(recipe, found), {})
    adapter_parameters = sum(adapter.layout.sizes.values())
    architecture = Architecture(
        found.hidden_size,
        found.num_layers,
        found.num_heads,
        found.num_key_value_heads,
        found.intermediate_size,
        found.vocab_size,
        found.max_positions,
        found.num_parameters,
        found.matrix_parameters,
        _weight_bytes(recipe, found),
    )
    tokens = recipe.training.batch_size * recipe.data.max_length
    flops = training_flops_per_token(
        architecture, adapter, gradient_checkpointing=recipe.model.gradient_checkpointing
    )
    memory = training_memory(
        TrainingShape(
            weight_bytes=architecture.weight_bytes,
            adapter_parameters=adapter_parameters,
            batch_size=recipe.training.batch_size,
            sequence_length=recipe.data.max_length,
            hidden_size=found.hidden_size,
            intermediate_size=found.intermediate_size,
            num_layers=found.num_layers,
            num_heads=found.num_heads,
            vocab_size=_outputs(recipe, found),
            activation_bytes=4 if recipe.model.dtype == "float32" else 2,
            gradient_checkpointing=recipe.model.gradient_checkpointing,
        )
    )
    size_bytes = adapter.size_bytes
    return Plan(
        recipe.model.path,
        found.num_parameters,
        adapter_parameters,
        size_bytes,
        memory,
        flops,
        tokens,
        tuple(_tiers(recipe, memory.total_bytes, tokens * flops, size_bytes)),
    )


def _blueprint(recipe: Recipe) -> Blueprint:
    model = recipe.model
    if model.architecture is not None:
        return blueprint_of_sizes(model.architecture)
    folder = MODEL_PATH if model.path == BUILTIN else Path(model.path).expanduser()
    if not folder.is_dir():
        raise RecipeError(
            f'model.path = "{model.path}" is no folder here, and a plan downloads nothing; state'
            " the model's sizes in [model.architecture]",
            path=model.path,
        )
    return blueprint_of_folder(folder)


def _layout(recipe: Recipe, found: Blueprint) -> AdapterLayout:
    """Return what is trained; its dtype is fp32, whatever the base's."""
    if recipe.lora.warm_start is not None:
        return _layout_of_folder(Path(recipe.lora.warm_start).expanduser(), recipe)
    layers = found.linear_layers()
    targets = recipe.lora.targets
    chosen = layers
    if not isinstance(targets, str):
        chosen = {
            name: dims
            for name, dims in layers.items()
            if any(name == one or name.endswith(f".{one}") for one in targets)
        }
        names = sorted({name.rpartition(".")[2] for name in layers})
        for one in targets:
            if not any(name == one or name.endswith(f".{one}") for name in chosen):
                raise RecipeError(
                    f"LoRA target {one!r} names no linear layer of {recipe.model.path}; it has"
                    f" {listed(names)}{nearest_name(one, names)}",
                    target=one,
                )
    rank, alpha = recipe.lora.rank, recipe.lora.alpha
    dense = {
        name: DenseShape(shape, "float32")
        for name, shape in found.tensors.items()
        if any(f".{one}." in f".{name}." for one in recipe.lora.modules_to_save)
    }
    if recipe.model.task == "sequence_classification" and recipe.data.label_names:
        classes = len(recipe.data.label_names)
        dense["head.weight"] = DenseShape((classes, found.hidden_size), "float32")
    return AdapterLayout(
        tuple(
            (name, LoraShape(in_dim, out_dim, rank, alpha, "float32"))
            for name, (out_dim, in_dim) in sorted(chosen.items())
        ),
        tuple(sorted(dense.items())),
    )


def _layout_of_folder(folder: Path, recipe: Recipe) -> AdapterLayout:
    shapes = tensor_shapes(folder, "adapter_model.safetensors")
    lora, dense = [], []
    for name, shape in sorted(shapes.items()):
        module, down, _ = name.partition(".lora_A.")
        if down:
            up = shapes.get(name.replace(".lora_A.", ".lora_B."), (0,))
            lora.append((module, LoraShape(shape[1], up[0], shape[0], 1.0, "float32")))
        elif ".lora_B." not in name:
            dense.append((name, DenseShape(shape, "float32")))
    if not lora:
        raise RecipeError(
            f'lora.warm_start = "{folder}" holds no LoRA factors', path=recipe.lora.warm_start
        )
    return AdapterLayout(tuple(lora), tuple(dense))


def _weight_bytes(recipe: Recipe, found: Blueprint) -> int:
    plain = 4 if recipe.model.dtype == "float32" else 2
    if recipe.model.quantization == "none":
        return plain * found.num_parameters
    # bitsandbytes packs linear layers; embeddings, head and norms stay as they are.
    packed = sum(math.prod(shape) for shape in found.linear_layers().values())
    return plain * (found.num_parameters - packed) + math.ceil(packed * _NF4_BITS / 8)


def _outputs(recipe: Recipe, found: Blueprint) -> int:
    if recipe.model.task == "causal_lm":
        return found.vocab_size
    return len(recipe.data.label_names or ())


def _tiers(recipe: Recipe, needed_bytes: int, step_flops: float, size_bytes: int) -> list[TierPlan]:
    fleet = recipe.fleet
    shares = PRESETS[fleet.preset].shares if fleet.preset is not None else {}
    if fleet.distribution is not None:
        shares = {fleet.reference: 1.0}
    devices = {
        name: kind.device
        if fleet.efficiency is None
        else replace(kind.device, efficiency=fleet.efficiency)
        for name, kind in KINDS.items()
    }
    step_s = {
        name: step_flops / (one.flops_per_s * one.efficiency) for name, one in devices.items()
    }
    steps = _local_steps(recipe, step_s, shares)
    return [
        TierPlan(
            name,
            shares.get(name, 0.0),
            device.memory_bytes,
            device.memory_bytes >= needed_bytes,
            step_s[name],
            steps[name],
            size_bytes / device.down_bytes_per_s + size_bytes / device.up_bytes_per_s,
            KINDS[name].source,
        )
        for name, device in devices.items()
    ]


def _local_steps(
    recipe: Recipe, step_s: Mapping[str, float], shares: Mapping[str, float]
) -> dict[str, int | None]:
    """Return what a client of each kind is given in a fleet of these shares."""
    by_speed = recipe.steps_by_speed
    if by_speed is None or not shares:
        return dict.fromkeys(step_s, recipe.training.steps)
    fleet = [step_s[name] for name, share in shares.items() for _ in range(round(1000 * share))]
    middle_s = median_high(fleet)
    return {name: by_speed.fit(own_s, middle_s) for name, own_s in step_s.items()}

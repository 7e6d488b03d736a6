"""Sizes of a model and what a token costs in it. Numbers only; nothing here loads weights.

FLOP counts follow Kaplan et al. 2020 (section 2.1): 2 FLOPs a multiply-add, matrices only, the
attention scores (which grow with the sequence) left out. Embedding look-ups are free, the output
head counts. A mixture of experts is charged for all its experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignfed.core.adapter import Adapter
from alignfed.errors import ModelError


@dataclass(frozen=True, slots=True)
class Architecture:
    """What memory planning needs to know of a base model.

    Attributes:
        hidden_size: width of the residual stream.
        num_layers: transformer layers.
        num_heads: attention heads.
        num_key_value_heads: heads of keys and values.
        intermediate_size: width inside the feed-forward block.
        vocab_size: entries of the output vocabulary.
        max_positions: longest sequence, None where the model sets no limit.
        num_parameters: all parameters of the base.
        matrix_parameters: entries of the matrices a token is multiplied with, head included.
        weight_bytes: bytes of the base's weights as loaded.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int | None
    num_parameters: int
    matrix_parameters: int
    weight_bytes: int


def read_architecture(
    config: Any, *, num_parameters: int, matrix_parameters: int, weight_bytes: int
) -> Architecture:
    """Return the sizes that a transformers configuration states, beside counted ones.

    Raises:
        ModelError: the configuration lacks one of them.
    """
    text = config.get_text_config()

    def size(*names: str) -> int:
        for name in names:
            if isinstance(value := getattr(text, name, None), int):
                return value
        raise ModelError(f"the model's config.json has none of {', '.join(names)}", names=names)

    hidden_size = size("hidden_size", "d_model", "n_embd")
    num_heads = size("num_attention_heads", "n_head", "num_heads")
    key_value_heads = getattr(text, "num_key_value_heads", None)
    # GPT-2's n_inner is null and means four times the width, as in Radford et al. 2019.
    intermediate = [
        value
        for name in ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size")
        if isinstance(value := getattr(text, name, None), int)
    ]
    positions = getattr(text, "max_position_embeddings", None)
    return Architecture(
        hidden_size=hidden_size,
        num_layers=size("num_hidden_layers", "n_layer", "num_layers"),
        num_heads=num_heads,
        num_key_value_heads=key_value_heads if isinstance(key_value_heads, int) else num_heads,
        intermediate_size=intermediate[0] if intermediate else 4 * hidden_size,
        vocab_size=size("vocab_size"),
        max_positions=positions if isinstance(positions, int) and positions > 0 else None,
        num_parameters=num_parameters,
        matrix_parameters=matrix_parameters,
        weight_bytes=weight_bytes,
    )


def forward_flops_per_token(architecture: Architecture, adapter: Adapter | None) -> float:
    """Return the FLOPs of one token's forward pass through the base and an adapter."""
    return 2.0 * (architecture.matrix_parameters + (adapter_size(adapter) if adapter else 0))


def training_flops_per_token(
    architecture: Architecture, adapter: Adapter, *, gradient_checkpointing: bool = False
) -> float:
    """Return the FLOPs of one token's forward and backward pass.

    The frozen base passes gradients on but computes none of its own: 2 + 2 FLOPs a parameter
    where a trained one costs 2 + 4 (Hu et al. 2021, section 4.2). Checkpointing runs the forward
    pass once more. Layers below the lowest adapter are charged as if gradients reached them.
    """
    trained = adapter_size(adapter)
    recomputed = forward_flops_per_token(architecture, adapter) if gradient_checkpointing else 0.0
    return 4.0 * architecture.matrix_parameters + 6.0 * trained + recomputed


def adapter_size(adapter: Adapter) -> int:
    """Return the number of elements in an adapter."""
    return sum(adapter.layout.sizes.values())

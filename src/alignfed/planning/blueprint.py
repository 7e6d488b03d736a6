"""Names and shapes of a model's tensors: from the headers of its files, or from stated sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from alignfed.config import ArchitectureSection
from alignfed.errors import ModelError

_EMBEDDINGS = ("embed", "wte", "wpe")
_HEADS = ("lm_head", "score", "classifier", "embed_out")


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model's tensors without their numbers.

    Attributes:
        tensors: shape of each stored tensor.
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        intermediate_size: width inside a feed-forward block.
        num_heads: attention heads.
        num_key_value_heads: heads of keys and values.
        vocab_size: entries of the vocabulary.
        max_positions: longest sequence, None where there is no limit.
        tied_head: whether the output head is the embedding matrix.
    """

    tensors: Mapping[str, tuple[int, ...]]
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_positions: int | None
    tied_head: bool

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def matrix_parameters(self) -> int:
        """Elements of the matrices a token is multiplied with, output head included."""
        head = self.vocab_size * self.hidden_size if self.tied_head else 0
        return head + sum(
            math.prod(shape)
            for name, shape in self.tensors.items()
            if len(shape) >= 2 and not _named(name, _EMBEDDINGS)
        )

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Return ``(out_dim, in_dim)`` of every linear layer but the head, by module name."""
        return {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in self.tensors.items()
            if len(shape) == 2
            and name.endswith(".weight")
            and not _named(name, _EMBEDDINGS)
            and not _named(name, _HEADS)
        }


def blueprint_of_sizes(sizes: ArchitectureSection) -> Blueprint:
    """Return the tensors of a Llama-like decoder (Touvron et al. 2023, section 2.2)."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    key_value = hidden // sizes.num_heads * sizes.num_key_value_heads
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (sizes.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not sizes.tied_embeddings:
        tensors["lm_head.weight"] = (sizes.vocab_size, hidden)
    for layer in range(sizes.num_layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (key_value, hidden),
            f"{prefix}.self_attn.v_proj.weight": (key_value, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
        }
    return Blueprint(
        tensors,
        sizes.num_layers,
        hidden,
        inner,
        sizes.num_heads,
        sizes.num_key_value_heads,
        sizes.vocab_size,
        sizes.max_positions,
        sizes.tied_embeddings,
    )


def blueprint_of_folder(folder: Path) -> Blueprint:
    """Return the tensors that a model's folder announces in ``config.json`` and file headers.

    Raises:
        ModelError: a file is missing, malformed, or lacks a size.
    """
    config = read_json(folder / "config.json")
    tensors = tensor_shapes(folder, "*.safetensors")

    def size(*names: str) -> int:
        for name in names:
            if isinstance(value := config.get(name), int) and value > 0:
                return value
        raise ModelError(
            f"{folder / 'config.json'} has none of {', '.join(names)}; state the model's sizes in"
            " [model.architecture]",
            path=str(folder),
        )

    hidden = size("hidden_size", "d_model", "n_embd")
    heads = size("num_attention_heads", "n_head")
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    return Blueprint(
        tensors,
        num_layers=size("num_hidden_layers", "n_layer", "num_layers"),
        hidden_size=hidden,
        intermediate_size=config.get("intermediate_size") or config.get("n_inner") or 4 * hidden,
        num_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        vocab_size=size("vocab_size"),
        max_positions=positions if isinstance(positions, int) and positions > 0 else None,
        tied_head=not any(_named(name, _HEADS) for name in tensors),
    )


def tensor_shapes(folder: Path, pattern: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the headers of a folder's safetensors files.

    Raises:
        ModelError: no file matches, or one is damaged.
    """
    files = sorted(folder.glob(pattern))
    if not files:
        raise ModelError(
            f"{folder} holds no {pattern}; sizes are read from safetensors headers only, so state"
            " them in [model.architecture]",
            path=str(folder),
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                shapes |= {
                    name: tuple(opened.get_slice(name).get_shape())
                    for name in opened.keys()  # noqa: SIM118 (not a dict)
                }
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read: {error}", path=str(file)) from error
    return shapes


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ModelError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", path=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object", path=str(path))
    return value


def _named(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in piece for piece in name.split(".") for part in parts)

"""The server's calibration mini-batch: losses, layer inputs and features.

Inputs and features come from the same positions for every adapter: all that are no filler, or
``max_positions`` of them at even distances, so that the server's n x n solves stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alignfed.core.adapter import Adapter
from alignfed.errors import DataError
from alignfed.training.batches import Batch, collate, length_batches, padded_length
from alignfed.training.encoding import Encoder
from alignfed.training.forward import AtPositions, score
from alignfed.training.models import BaseModel
from alignfed.training.templates import Example


class CalibrationBatch:
    """Looks at adapters through a few examples (``core.ports.Calibrator``)."""

    def __init__(
        self,
        base: BaseModel,
        encoder: Encoder,
        examples: Sequence[Example],
        *,
        max_positions: int = 256,
        tokens_per_batch: int | None = None,
    ) -> None:
        """Tokenise and pad the examples once.

        Raises:
            DataError: no examples, or no positions to look at.
        """
        if not examples:
            raise DataError("the calibration set is empty; raise data.calibration_examples")
        if max_positions < 1:
            raise DataError(f"max_positions is {max_positions}, must be at least 1")
        self.base = base
        sequences = encoder.encode(examples)
        self._batches: list[Batch] = [
            collate(
                sequences,
                rows,
                pad_id=base.pad_id,
                length=padded_length(int(sequences.lengths[rows].max()), encoder.max_length),
                classify=base.is_classifier,
            ).to(base.device)
            for rows in length_batches(sequences.lengths, tokens_per_batch or base.tokens_per_batch)
        ]
        self._positions = _spread(self._batches, max_positions)

    @property
    def tokens(self) -> int:
        """Tokens (filler included) in the calibration mini-batch."""
        return sum(batch.num_tokens for batch in self._batches)

    def loss(self, adapter: Adapter) -> float:
        """Return the mean loss over scored tokens (over texts for a classifier), in nats."""
        self.base.install(adapter)
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in self._batches:
                losses = score(self.base, batch).losses
                total += float(losses.double().sum())
                count += losses.numel()
        return total / count

    def gradient(self, adapter: Adapter) -> Adapter:
        """Return the gradient of ``loss`` by the adapter's elements, in fp32."""
        self.base.install(adapter)
        self.base.gradients.zero_()
        count = sum(batch.targets.numel() for batch in self._batches)
        for batch in self._batches:
            (score(self.base, batch).losses.sum() / count).backward()
        found = self.base.gradients.to("cpu", copy=True)
        self.base.gradients.zero_()
        return Adapter(self.base.layout, {torch.float32: found})

    def inputs(self, adapter: Adapter) -> Mapping[str, Tensor]:
        """Return the inputs of each adapted module, by name, shape ``(positions, in_dim)``.

        A module that sees one vector a text (a pooler) gives one row a text.
        """
        self.base.install(adapter)
        seen: dict[str, list[Tensor]] = {name: [] for name in self.base.lora_layers}
        for batch, positions in zip(self._batches, self._positions, strict=True):
            handles = [
                layer.register_forward_pre_hook(_recorder(seen[name], batch, positions))
                for name, layer in self.base.lora_layers.items()
            ]
            try:
                self._run(batch, positions)
            finally:
                for handle in handles:
                    handle.remove()
        return {name: torch.cat(parts) for name, parts in seen.items()}

    def features(self, adapter: Adapter) -> Tensor:
        """Return penultimate features in fp32, shape ``(positions, hidden_dim)``.

        For a classifier one row a text.
        """
        self.base.install(adapter)
        return torch.cat(
            [
                self._run(batch, positions)
                for batch, positions in zip(self._batches, self._positions, strict=True)
            ]
        )

    def _run(self, batch: Batch, positions: Tensor) -> Tensor:
        base = self.base
        with torch.no_grad():
            if base.is_classifier:
                return score(base, batch).features.float().cpu()
            base.tap.select = AtPositions(positions)
            try:
                with base.autocast():
                    base.peft_model.get_base_model()(
                        input_ids=batch.input_ids, attention_mask=batch.attention_mask
                    )
                features = base.tap.features
            finally:
                base.tap.select = base.tap.features = None
        assert features is not None  # the head always runs
        return features.squeeze(0).float().cpu()


def _spread(batches: Sequence[Batch], max_positions: int) -> list[Tensor]:
    """Return, for each batch, flat indices of the positions to look at, ascending."""
    every = [batch.attention_mask.reshape(-1).nonzero().squeeze(1) for batch in batches]
    total = sum(len(one) for one in every)
    if total <= max_positions:
        return every
    chosen = torch.from_numpy(np.linspace(0, total - 1, max_positions).round().astype(np.int64))
    spread, start = [], 0
    for one in every:
        inside = chosen[(chosen >= start) & (chosen < start + len(one))] - start
        spread.append(one[inside.to(one.device)])
        start += len(one)
    return spread


def _recorder(
    into: list[Tensor], batch: Batch, positions: Tensor
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen = inputs[0].detach()
        flat = seen.reshape(-1, seen.shape[-1])
        if seen.shape[:-1].numel() == batch.num_tokens:
            flat = flat[positions]
        into.append(flat.float().cpu())

    return record
